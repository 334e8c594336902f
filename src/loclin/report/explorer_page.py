"""An exploration as a page that answers for any word: it has the vectors of the parts, and rows of the output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from loclin.analyses.attribution.groups import Group
from loclin.analyses.exploration.result import Exploration
from loclin.common.brief import brief
from loclin.report.html import write_page
from loclin.report.packing import Whole, find_step, pack, round_sums, round_to
from loclin.report.run import prompt, run_of
from loclin.report.sheet import (
    KEY,
    PAGE,
    Chip,
    Limits,
    Section,
    Sheet,
    describe,
    left_out,
    sheet_of,
)
from loclin.report.table import BAR, COUNTER, Bar, Column, Table
from loclin.report.text import certified, error, number, plain, predicted, shortened, signed, token, visible
from loclin.report.units import full_group

CLOSES = 1e-3
"""How close the page's sums and shares are, relative to the logit, or absolutely where that is less than 1."""
_TEXT = 40


@dataclass(frozen=True)
class _Stored:
    """Vectors as whole numbers, and by how much the page's sums miss logits at most, as of `CLOSES`.

    A share is the sum over all units of cells times rows times weights.
    """

    cells: Whole
    heads: Whole
    rows: Whole
    weights: NDArray[np.float64]
    worst: float

    __repr__ = brief


@describe.register
def describe_exploration(found: Exploration, limits: Limits = PAGE) -> Sheet:
    """Say what an exploration has, and the shares of the predicted word."""
    goal, run = found.goal(), run_of(found)
    shares = found.shares().sum(1).tolist()
    sinks = set(found.sinks)
    full = full_group(found.rows, shares[:-1], sinks)
    table = Table.of(COUNTER, Column("tokens", "key"), "share", BAR)
    ranked = sorted(range(len(found.rows)), key=lambda i: -abs(shares[i]))[: limits.tokens]
    for i in sorted(ranked):
        table.add(str(found.rows[i].positions[0]), token(found.rows[i].name), signed(shares[i]), Bar(shares[i] / full))
    bias = shares[-1] + goal.offset
    table.add("", "biases", signed(bias), Bar(bias / full))
    words = " − ".join(visible(word) for word in goal.words)
    sums = f"{words}: {number(goal.value)}, rounding {error(abs(found.residual()))}"
    note = f"of {len(found.words)} words that the page answers for"
    first, *others = [(text, p) for _, text, p in found.predictions[:5]]
    return sheet_of(
        found,
        "the model, at this prompt, as an exact linear map",
        [Section(f"Shares of {words}", note, [table, *left_out(len(found.rows) - len(ranked)), Text(sums, "bold")])],
        heading=Text.assemble(shortened(prompt(found)), (" → ", "dim"), token(first[0])),
        chips=[
            Chip(row.name, share / full, f"{signed(share)}", ["sink"] * bool(sinks & set(row.positions)))
            for row, share in zip(found.rows, shares, strict=False)
        ],
        key=KEY,
        lead=[predicted(first, others), certified(found.certificate)],
        run=replace(run, more=(f"{run.options['source']} → {run.options['target']}",)),
    )


def page(found: Exploration) -> str:
    """Write an exploration as a self-contained page."""
    stored, run, position = _store(found), run_of(found), found.provenance.position
    lens = {"lens": found.lens_top, "lensRanks": found.lens_ranks, "ranks": found.ranks}
    arrays = {"cells": stored.cells, "heads": stored.heads, "rows": stored.rows}
    about, blob = pack(arrays | {name: numbers.numpy().astype(np.int64) for name, numbers in lens.items()})
    data = {
        "arrays": about,
        "weights": [float(f"{weight:.12g}") for weight in stored.weights],
        "by": found.by,
        "rows": [
            {
                "text": visible(row.name, _TEXT),
                "at": row.positions,
                "sink": bool({*found.sinks} & {*row.positions}),
                "special": {*row.positions} <= {*found.special},
            }
            for row in found.rows
        ],
        "components": found.components,
        "heads": found.head_names,
        "words": [visible(text, _TEXT) for text in found.words],
        "ids": found.ids,
        "offsets": _finite(found.offsets.tolist()),
        "logits": _finite(found.logits.tolist()),
        "predictions": [[token_id, visible(text, _TEXT), p] for token_id, text, p in found.predictions],
        "lensAt": found.lens_positions,
        "position": position,
        "lensWords": {token_id: visible(text, _TEXT) for token_id, text in found.lens_words.items()},
        "units": {unit: _labels(found, groups) for unit, groups in found.groups.items() if len(groups) > 1},
        "about": [
            plain(prompt(found)),
            run.line.plain,
            f"{'exact' if found.certificate.passed else 'NOT EXACT'}: reconstruction error "
            f"{error(found.certificate.reconstruction_error)}",
        ],
    }
    return write_page(
        "explorer.html",
        describe_exploration(found),
        data,
        "explorer.js",
        plots=False,
        blob=blob,
        found=found,
        worst=stored.worst,
        closes=error(CLOSES * stored.worst),
        bits=(_bits(stored.cells), _bits(stored.rows)),
    )


def _bits(numbers: Whole) -> int:
    return int(np.abs(numbers).max(initial=0)).bit_length() + 1


def _finite(numbers: list[float]) -> list[float | None]:
    """Numbers for JSON: where the model rules words out, the mean of all logits is none."""
    return [value if np.isfinite(value) else None for value in numbers]


def _labels(found: Exploration, groups: Sequence[Group]) -> list[Any]:
    """The number of the group to which each row belongs, by its first token, and the names of groups."""
    owner = {at: i for i, group in enumerate(groups) for at in group.positions}
    return [[owner[row.positions[0]] for row in found.rows], [visible(group.name, _TEXT) for group in groups]]


def _store(found: Exploration) -> _Stored:
    """Round vectors as far as all sums and shares stay within `CLOSES`, and say how far the sums are off.

    Units with large numbers in the parts have more digits in the rows, and the other way round: what rounding one of
    them does to a share is as large as the other.
    """
    cells, heads = found.cells.double().numpy(), found.heads.double().numpy()
    rows, offsets, logits = (one.double().numpy() for one in (found.directions, found.offsets, found.logits))
    allowed = CLOSES * np.maximum(np.abs(np.nan_to_num(logits)), 1.0)
    sums = np.concatenate([cells.sum((0, 1))[None], cells.sum(1), cells.sum(0), heads])
    exact = sums @ rows.T
    by_unit, of_rows = _sizes(sums), _sizes(rows)

    def miss(parts: NDArray[Any], own: NDArray[Any]) -> float:
        """By how much the shares of whole rows, whole columns and heads are off, as of what is allowed."""
        return float((np.abs(parts @ own.T - exact) / allowed).max())

    wide = rows * by_unit
    rows_step = find_step(np.abs(wide).max(), lambda step: 2.0 * miss(sums, round_to(wide, step) * step / by_unit))
    whole = round_to(wide, rows_step)
    own, given, head_parts = whole * rows_step / by_unit, cells * of_rows, heads * of_rows

    def miss_cells(step: float) -> float:
        rounded, back = round_sums(given, step), step / of_rows
        stored = [rounded.sum((0, 1))[None], rounded.sum(1), rounded.sum(0), round_to(head_parts, step)]
        # the difference of two products, as two of differences: float32 is enough for these
        each = (
            _product(parts, own - rows) + _product(row * back - parts, own)
            for row, parts in zip(rounded, cells, strict=True)
        )
        return max(miss(np.concatenate(stored) * back, own), *(float((np.abs(one) / allowed).max()) for one in each))

    step = find_step(np.abs(given).max(), miss_cells)
    rounded, weights = round_sums(given, step), step * rows_step / by_unit / of_rows
    off = np.abs((rounded.sum((0, 1)) * weights) @ whole.T + offsets - logits) / allowed
    return _Stored(rounded, round_to(head_parts, step), whole, weights, float(np.nanmax(off)))


def _product(parts: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.float32]:
    return parts.astype(np.float32) @ rows.astype(np.float32).T


def _sizes(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """How large numbers are in each unit, relative to the largest."""
    sizes = np.sqrt(np.square(vectors).mean(0))
    most = sizes.max() or 1.0
    return np.maximum(sizes / most, 1e-6)
