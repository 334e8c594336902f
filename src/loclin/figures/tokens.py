"""Figures of the tokens' maps: 3 (reconstruction), 4A (rows and columns), 4B, 5 and A1 (singular vectors)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import SubplotSpec

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.common.arguments import whole
from loclin.figures.canvas import COLOURS, LINE, Drawing, canvas, colours, log_axis
from loclin.figures.given import Explained, explained
from loclin.report.text import error, sigmas, visible

_TOKENS = 12
_NAME = 12
_GAP = 0.5
"""Between the lines of two tokens, in lines."""
_FLOOR = 1e-4
"""How far below the largest singular value of all a spectrum is drawn."""
_FROZEN, _ORDINARY = COLOURS[1], COLOURS[0]


@dataclass(frozen=True)
class _Line:
    """A number of a token's map, and the words beside it."""

    label: str
    value: float
    reads: list[str]
    writes: list[str]


_Groups = list[tuple[TokenExplanation, Any, list[_Line]]]


def figure_3(
    found: Explained | Sequence[Explained],
    *,
    width: float | None = None,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """Output and reconstruction, a panel for each model (paper, Figure 3; equation 2).

    Each point is one of the d elements of the output y (x axis) and of what a map gives for it (y axis): J x + b, the
    frozen map (orange), and the ordinary Jacobian times x (blue), which is off the line. Numbers are std(error)/std(y).

    `found`: from `loclin.linearize` or `loclin.explain`, or several of them. `width`, `height`: inches. `style`: a
    .mplstyle file, or the name of one of matplotlib's. Raises OptionError for a size or a style that there is not.
    Cost: `loclin.explain` of each linearized prompt.
    """
    results = explained(found)
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    width = (6.75 if columns > 1 else 3.3) if width is None else width
    usual = rows * (width / columns + 0.35)
    with canvas("Figure 3", width, height, usual, style, results) as figure:
        for i, (axes, one) in enumerate(zip(_grid(figure, rows, columns, len(results)), results, strict=True)):
            _scatter(figure, axes, one, ascii_uppercase[i % 26] if len(results) > 1 else "")
            figure.head(one, axes)
    return figure


def figure_4a(
    found: Explained,
    *,
    lines: int = 3,
    width: float = 6.75,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """The largest rows and columns of each token's map J_i (equation 2), in words (paper, Figure 4A).

    Left: the norms of J_i's largest rows, which are units of the output, with the input tokens that drive them, the
    nearest embeddings. Right: those of its largest columns, which are units of the input, with the words that they
    write through the output head. Marks are the norms; #n is the unit. Signs are those of the map.

    `lines`: how many rows and columns of each token. `found`, `width`, `height`, `style`, errors: see `figure_3`.
    """
    (result,) = explained([found])
    lines = whole("lines", lines, 1, 5)
    tokens, left_out = _choose(result)

    def read(side: str) -> _Groups:
        return [
            (token, colour, [_unit(side, unit) for unit in getattr(token, side)[:lines]]) for token, colour in tokens
        ]

    panels = [("A", "rows", read("rows")), ("B", "columns", read("columns"))]
    count = max(_count(groups) for _, _, groups in panels)
    with canvas("Figure 4A", width, height, count * LINE + 0.8, style, [result], int(count)) as figure:
        figure.warnings += left_out
        grid = figure.add_gridspec(1, 2, wspace=0.06)
        for i, (letter, side, groups) in enumerate(panels):
            words, at = ("reads", "writes")[i], f"norm of the {side.removesuffix('s')}"
            axes = _draw_lines(figure, grid[0, i], groups, at, **{words: True})
            figure.panel(axes, letter)
        figure.head(result)
    return figure


def _unit(side: str, unit: Any) -> _Line:
    words = [word for word, _ in unit.words]
    return _Line(f"#{unit.index}", unit.norm, *((words, []) if side == "rows" else ([], words)))


def figure_4b(
    found: Explained,
    *,
    lines: int = 3,
    width: float = 6.75,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """Each token's singular values, with what its singular vectors read and write in words (paper, Figure 4B).

    Of the map J_i = U S V^T of each token (equation 2, section 3.3). Above: all of its singular values. Below: the
    largest ones; on the left the nearest input embeddings of the right vectors V (what they read), on the right the
    words of the left vectors U (what they write) through the output head. Near-equal values are one line, since only
    the subspace of their vectors is defined.

    `lines`: how many singular values of each token. `found`, `width`, `height`, `style`, errors: see `figure_3`.
    """
    return _singular_vectors("Figure 4B", [found], lines, width, height, style)


def figure_5(
    found: Explained | Sequence[Explained],
    *,
    lines: int = 2,
    width: float = 6.75,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """The singular vectors of several models, a panel as in `figure_4b` for each (paper, Figure 5; section 3.4).

    `lines`: how many singular values of each token. `found`, `width`, `height`, `style`, errors: see `figure_3`.
    """
    return _singular_vectors("Figure 5", found, lines, width, height, style)


def figure_a1(
    found: Explained,
    *,
    lines: int = 2,
    width: float = 6.75,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """The reconstruction of one model (A, as in `figure_3`) and its singular vectors (B, as in `figure_4b`; Figure A1).

    `lines`: how many singular values of each token. `found`, `width`, `height`, `style`, errors: see `figure_3`.
    """
    lines = whole("lines", lines, 1)
    (result,) = explained([found], lines)
    tokens, left_out = _choose(result)
    groups = _vectors(tokens, lines)
    usual = _count(groups) * LINE + 1.9
    with canvas("Figure A1", width, height, usual, style, [result], int(_count(groups))) as figure:
        figure.warnings += left_out
        grid = figure.add_gridspec(1, 2, width_ratios=(1, 2.1), wspace=0.06)
        _scatter(figure, figure.add_subplot(grid[0, 0]), result, "A")
        _draw_vectors(figure, grid[0, 1], groups, "B")
        figure.head(result)
    return figure


def _singular_vectors(
    title: str,
    found: Explained | Sequence[Explained],
    lines: int,
    width: float,
    height: float | None,
    style: str | os.PathLike[str] | None,
) -> Drawing:
    lines = whole("lines", lines, 1)
    results = explained(found, lines)
    chosen = [_choose(one) for one in results]
    panels = [_vectors(tokens, lines) for tokens, _ in chosen]
    columns = min(2, len(results))
    rows, count = -(-len(results) // columns), max(map(_count, panels))
    with canvas(title, width, height, rows * (count * LINE + 1.9), style, results, int(rows * count)) as figure:
        figure.warnings += [warning for _, left_out in chosen for warning in left_out]
        grid = figure.add_gridspec(rows, columns, wspace=0.05, hspace=0.05)
        for i, (one, groups) in enumerate(zip(results, panels, strict=True)):
            letter = ascii_uppercase[i % 26] if len(results) > 1 else ""
            figure.head(one, _draw_vectors(figure, grid[divmod(i, columns)], groups, letter))
    return figure


def _grid(figure: Drawing, rows: int, columns: int, count: int) -> Iterator[Axes]:
    grid = figure.add_gridspec(rows, columns)
    return (figure.add_subplot(grid[divmod(i, columns)]) for i in range(count))


def _scatter(figure: Drawing, axes: Axes, result: Explanation, letter: str) -> None:
    """Draw what both maps give against the output."""
    y = np.array(result.output)
    both = (
        ("ordinary", result.ordinary, _ORDINARY, result.ordinary_error),
        ("frozen", result.reconstruction, _FROZEN, result.certificate.std_error),
    )
    lowest, highest = y.min(), y.max()
    axes.plot([lowest, highest], [lowest, highest], color="0.6", linewidth=0.6, zorder=0)
    for name, values, colour, off in both:
        axes.plot(
            y, values, ".", color=colour, markersize=2, markeredgewidth=0, label=f"{name}: {error(off)}", alpha=0.8
        )
    axes.set_xlabel("element of the output y")
    axes.set_ylabel("reconstruction")
    axes.set_box_aspect(1)
    axes.set_anchor("N")
    axes.legend(title="std(error) / std(y)", title_fontsize=6, loc="lower right", handletextpad=0.1, markerscale=3)
    figure.panel(axes, letter)


def _choose(result: Explanation) -> tuple[list[tuple[TokenExplanation, Any]], list[str]]:
    """Choose which tokens are drawn, and their colours: of a long prompt those with the largest shares."""
    tokens, shown = result.tokens, list(range(len(result.tokens)))
    left_out = []
    if len(tokens) > _TOKENS:
        shown = sorted(sorted(shown, key=lambda i: -abs(tokens[i].share))[:_TOKENS])
        left_out = [f"{_TOKENS} of {len(tokens)} tokens are drawn, those with the largest shares of the prediction."]
    return [(tokens[i], colour) for i, colour in zip(shown, colours(len(shown)), strict=True)], left_out


def _vectors(tokens: Sequence[tuple[TokenExplanation, Any]], lines: int) -> _Groups:
    """The lines of the largest singular values of each token; none for a map that is zero."""
    return [
        (
            token,
            colour,
            [
                _Line(sigmas(b.indices), b.values[0], [word for word, _ in b.reads], [word for word, _ in b.writes])
                for b in token.blocks
                if b.indices[0] < lines
            ],
        )
        for token, colour in tokens
    ]


def _count(groups: _Groups) -> float:
    """How many lines there is room for: as many as there are, gaps included, and not too few for an axis."""
    return max(6.0, sum(max(1, len(lines)) + _GAP for _, _, lines in groups))


def _draw_vectors(figure: Drawing, cell: SubplotSpec, groups: _Groups, letter: str) -> Axes:
    """Draw all singular values above, and the largest of each token with its words below; gives the axes above."""
    inner = cell.subgridspec(2, 1, height_ratios=(1.0, _count(groups) * LINE), hspace=0.02)
    axes = figure.add_subplot(inner[0])
    largest = max(token.singular_values[0] for token, _, _ in groups)
    fonts: list[str] = []
    for token, colour, _ in groups:
        values = token.singular_values
        name, families = figure.letters(visible(token.text, _NAME))
        fonts += [family for family in families if family not in fonts]
        axes.plot(range(1, len(values) + 1), values, color=colour, label=name)
    axes.set_ylim(_FLOOR * largest, 1.6 * largest)
    log_axis(axes, "x", "y")
    axes.set_ylabel("singular value")
    axes.set_xlabel("rank", labelpad=0)
    axes.legend(loc="lower left", ncols=4, prop={"family": fonts, "size": 6}, labelspacing=0.2, columnspacing=1)
    figure.panel(axes, letter)
    _draw_lines(figure, inner[1], groups, "singular value", reads=True, writes=True)
    return axes


def _draw_lines(
    figure: Drawing, cell: SubplotSpec, groups: _Groups, label: str, *, reads: bool = False, writes: bool = False
) -> Axes:
    """Draw a mark for each line, the token's name in front, and words on one side or both; gives the first axes."""
    sides = ["names", *(["reads"] if reads and writes else []), "labels", "marks", "writes" if writes else "reads"]
    share = {"names": 0.8, "reads": 2.2, "labels": 0.75, "marks": 1.0, "writes": 2.2}
    parts = cell.subgridspec(1, len(sides), width_ratios=[share[side] for side in sides], wspace=0.02)
    first = None
    drawn: dict[str, Axes] = {}
    for i, side in enumerate(sides):
        first = drawn[side] = figure.add_subplot(parts[i], sharey=first)
    for side, axes in drawn.items():
        if side != "marks":
            axes.set_axis_off()
    labels, marks = drawn["labels"], drawn["marks"]
    y = 0.0
    for token, colour, lines in groups:
        figure.row(drawn["names"], y, [token.text])
        for line in lines:
            marks.plot([line.value], [y], "o", color=colour)
            grey: dict[str, Any] = {"color": "0.4", "transform": labels.get_yaxis_transform()}
            figure.write(labels, 1.0, y, line.label, ha="right", va="center", **grey)
            for side, words in (("reads", line.reads), ("writes", line.writes)):
                if side in drawn:
                    figure.row(drawn[side], y, words, right=side == "reads" and writes)
            y += 1
        y += _GAP + (not lines)
    marks.set_ylim(y - _GAP, -1 + _GAP / 2)
    log_axis(marks, "x")
    marks.tick_params(left=False, labelleft=False)
    marks.grid(axis="y", visible=False)
    marks.set_xlabel(label)
    for side, text, x in (("reads", "reads", float(writes)), ("writes", "writes", 0.0)):
        if side in drawn:
            at: dict[str, Any] = {"transform": drawn[side].transAxes, "style": "italic", "color": "0.4"}
            drawn[side].text(x, 1, text, ha="right" if x else "left", va="bottom", **at).set_in_layout(False)
    return drawn[sides[0]]
