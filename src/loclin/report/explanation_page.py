"""An explanation as an interactive page: a token is chosen, and its map is shown in words.

Colours of its figures that depend on light or dark are left to the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from loclin.analyses.decode import Words
from loclin.analyses.explain import Explanation, TokenExplanation, Unit
from loclin.report.explanation import describe_explanation, largest, summary
from loclin.report.html import write_page
from loclin.report.maps import check_table
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, PALETTE, POSITIVE, curve, draw
from loclin.report.text import error, number, sigmas, signed, visible

FULL_SPECTRA = 64
SPECTRUM_POINTS = 40_000
"""Points of all spectra together; beyond them, and beyond `FULL_SPECTRA` tokens, every spectrum is thinned."""
CURVES = 6
"""Spectra shown at first; the others wait in the legend."""
SCATTER_POINTS = 4096
NAMED_TICKS = 48
"""Beyond this many tokens an axis counts them and their names are left to hovering."""
_WORD = 28


def page(found: Explanation) -> str:
    """Write an explanation as a self-contained, interactive HTML page."""
    tokens = found.tokens
    apart = {*found.skipped, *(i for i, part in enumerate(tokens) if part.is_sink)}
    candidates = [i for i in range(len(tokens)) if i not in apart] or list(range(len(tokens)))
    data = {
        "tokens": [_token(i, part, found.target["kind"]) for i, part in enumerate(tokens)],
        "selected": max(candidates, key=lambda i: abs(tokens[i].share)),
        "figures": {"shares": _shares(found), "scatter": _scatter(found), "spectra": _spectra(found)},
    }
    return write_page(
        "explanation.html",
        describe_explanation(found),
        data,
        "explanation.js",
        found=found,
        checks=check_table(found.certificate, found.ordinary_error),
        names=[f"{i} {visible(part.text, 24)}" for i, part in enumerate(tokens)],
        spectra_note=_spectra_note(tokens),
    )


def _token(index: int, part: TokenExplanation, kind: str) -> dict[str, Any]:
    """Give what the page shows of a selected token; numbers are ready to be shown."""
    return {
        "text": visible(part.text),
        "about": summary(index, part),
        "facts": [
            [f"share of the {kind}", signed(part.share)],
            ["Frobenius norm", number(part.frobenius_norm)],
            ["stable rank", number(part.stable_rank)],
            ["token id", str(part.id)],
        ],
        "blocks": [
            {
                "name": sigmas(block.indices),
                "values": ", ".join(map(number, block.values)),
                "size": block.values[0] / part.blocks[0].values[0],
                "gain": None if block.gain is None else signed(block.gain),
                "writes": _words(block.writes),
                "reads": _words(block.reads),
            }
            for block in part.blocks
        ],
        "rows": _units(part.rows),
        "columns": _units(part.columns),
    }


def _units(units: Sequence[Unit]) -> list[dict[str, Any]]:
    return [{"index": unit.index, "norm": number(unit.norm), "words": _words(unit.words)} for unit in units]


def _words(words: Words) -> list[list[Any]]:
    return [[visible(text, _WORD), float(f"{score:.3g}")] for text, score in words]


def _spectra_note(tokens: Sequence[TokenExplanation]) -> str:
    points, length = _spectrum_points(tokens)
    note = "A token in the legend shows or hides its curve; the selected one is drawn bold."
    if len(tokens) > CURVES:
        note += f" At first: the {CURVES} largest shares."
    if points < length:
        note += f" Curves are thinned to about {points} of {length} points."
    return note


def _spectrum_points(tokens: Sequence[TokenExplanation]) -> tuple[int, int]:
    """Count the points that each spectrum may have, and those of the longest."""
    length = max(len(token.singular_values) for token in tokens)
    return length if len(tokens) <= FULL_SPECTRA else min(length, SPECTRUM_POINTS // len(tokens)), length


def _thinned(length: int, most: int) -> Any:
    """Choose about `most` of `length` places: half of them evenly, half ever further apart."""
    if length <= most:
        return np.arange(length)
    even = np.linspace(0, length - 1, most // 2)
    wider = np.geomspace(1, length, most - most // 2) - 1
    return np.unique(np.concatenate([even, wider]).round().astype(np.int64))


def _label(token: TokenExplanation) -> str:
    """Name a token in a figure, where plotly reads a few HTML tags, %{templates} and $formulas$."""
    return html.escape(visible(token.text, 24)).replace("%", "&#37;").replace("$", "&#36;")


def _shares(found: Explanation) -> dict[str, Any]:
    """Draw what is shared out as bars: a bar for each token, the last one for the biases."""
    tokens, bias = found.tokens, found.bias_share
    names = [*map(_label, tokens), "bias"]
    notes = [
        f"<b>{name}</b>{' (sink)' * part.is_sink}<br>share {signed(part.share)}<br>Frobenius norm "
        f"{number(part.frobenius_norm)}<br>stable rank {number(part.stable_rank)}"
        for name, part in zip(names, tokens, strict=False)
    ]
    named, places = len(names) <= NAMED_TICKS, list(range(len(names)))
    bars = {
        "type": "bar",
        "x": places,
        "y": np.array([*(token.share for token in tokens), bias], dtype=np.float32),
        "marker": {
            "color": [POSITIVE if token.share >= 0 else NEGATIVE for token in tokens] + [NEUTRAL],
            "pattern": {"shape": ["/" * token.is_sink for token in tokens] + [""], "solidity": 0.25},
        },
        "hovertext": [*notes, f"<b>bias</b><br>share {signed(bias)}"],
        "hoverinfo": "text",
    }
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": names} if named else {}
    return draw(
        [bars],
        x=None if named else "token",
        y=f"share of the {found.target['kind']}",
        bargap=0.25 if named else 0.05,
        xaxis={"showgrid": False, "automargin": True} | ticks,
        yaxis_zeroline=True,
    )


def _scatter(found: Explanation) -> dict[str, Any]:
    """Draw both reconstructions against the output (paper, Figure 3)."""
    y = np.array(found.output, dtype=np.float32)
    order = np.argsort(y)[_thinned(len(y), SCATTER_POINTS)]  # along the sorted output, so that the extremes stay
    ends = [float(y.min()), float(y.max())]
    traces = [curve(ends, ends, "exact", NEUTRAL, mode="lines", line={"width": 1, "dash": "dot"}, hoverinfo="skip")]
    for name, values, problem, colour, symbol in (
        ("ordinary Jacobian", found.ordinary, found.ordinary_error, NEGATIVE, "diamond-open"),
        ("frozen map Jx + b", found.reconstruction, found.certificate.std_error, POSITIVE, "circle"),
    ):
        traces.append(
            {
                "type": "scatter",
                "x": y[order],
                "y": np.array(values, dtype=np.float32)[order],
                "mode": "markers",
                "name": f"{name}: error {error(problem)}",
                "marker": {"color": colour, "size": 5, "symbol": symbol, "opacity": 0.75},
                "customdata": order.astype(np.int32),
                "hovertemplate": "unit %{customdata}<br>model %{x:.5g}<br>rebuilt %{y:.5g}<extra></extra>",
            }
        )
    return draw(traces, x="the model's output, each unit", y="rebuilt", legend=ABOVE, margin_t=64)


def _spectra(found: Explanation) -> dict[str, Any]:
    """Draw each token's singular values over its largest; a zero map has none."""
    tokens, traces, least = found.tokens, [], []
    first, (points, _) = largest(found, CURVES), _spectrum_points(tokens)
    for i, part in enumerate(tokens):
        values = np.array(part.singular_values, dtype=np.float64)
        if not len(values) or not values[0] > 0:
            continue
        values = values[values > 0] / values[0]  # a logarithm has no place for zero
        least.append(values.min())
        kept = _thinned(len(values), points)
        traces.append(
            {
                "type": "scatter",
                "x": (kept + 1).astype(np.int32),
                "y": values[kept].astype(np.float32),
                "mode": "lines" if len(kept) > 1 else "markers",
                "name": f"{i} {_label(part)}",
                "meta": i,
                "line": {"color": PALETTE[i % len(PALETTE)], "width": 1.5},
                "visible": True if i in first else "legendonly",
                "hovertemplate": "%{fullData.name}<br>σ%{x} = %{y:.3g} σ1<extra></extra>",
            }
        )
    decades = 1 if least and min(least) > 1e-10 else None  # few enough to name each one
    return draw(
        traces,
        x="singular value, the largest first",
        y="σ / σ1",
        legend={"maxheight": 0.9},
        yaxis={"type": "log", "exponentformat": "power", "dtick": decades},
    )
