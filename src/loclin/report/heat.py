"""A matrix of shares as a table of coloured cells; each cell says what it is when it is pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loclin.report.text import signed

BEYOND = 1.005
"""Parts of the full size from which on something is drawn as clipped: half a pixel more than full."""
_MANY = 32
"""Columns from which on cells are narrow."""


def heat_map(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[tuple[str, int]],
    titles: Sequence[Sequence[str]],
    full: float,
    note: str,
) -> str:
    """Draw a heat map.

    Parameters
    ----------
    rows
        Each row's name and values; None where there is no cell.
    columns
        Names above the columns, and how many columns each one spans.
    titles
        What each cell is.
    full
        The size in full colour.
    note
        What the columns are.
    """
    wide = " wide" if sum(span for _, span in columns) > _MANY else ""
    head = "".join(f'<th scope="colgroup" colspan="{span}">{escape(name)}</th>' for name, span in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f"{''.join(_cell(value, title, full) for value, title in zip(values, named, strict=True))}"
        f'<td class="sum">{signed(sum(value or 0.0 for value in values))}</td></tr>'
        for (name, values), named in zip(rows, titles, strict=True)
    )
    beyond = any(abs(value or 0.0) > BEYOND * full for _, values in rows for value in values)
    return (
        f'<div class="scroll"><table class="heat{wide}"><thead><tr><th></th>{head}<th>sum</th></tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">Columns: {escape(note)}. '
        f"Full colour: {signed(full).lstrip('+')}{'; outlined: more' if beyond else ''}.</p>"
    )


def _cell(value: float | None, title: str, full: float) -> str:
    if value is None:
        return '<td style="--a:0"></td>'
    kinds = ["neg"] * (value < 0) + ["beyond"] * (abs(value) > BEYOND * full)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return (
        f'<td{kind} style="--a:{min(abs(value) / full, 1.0):.2f}" title="{escape(f"{title}: {signed(value)}")}"></td>'
    )
