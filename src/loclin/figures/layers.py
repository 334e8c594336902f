"""Figure 6: how the maps change from layer to layer."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator

from loclin.analyses.layers import LayerExplanation
from loclin.figures.canvas import COLOURS, Drawing, canvas, depth_colours, log_axis
from loclin.figures.given import Layered, layered
from loclin.report.text import COMPONENTS

_LISTED = 18
"""How many layers' words are listed at most."""
_APART = 0.05
"""How far from all others a point of the path is that has its layer written beside it."""
_MARKS = {"resid_post": (COLOURS[0], "o"), "attn_out": (COLOURS[1], "^"), "mlp_out": (COLOURS[2], "s")}

Style = str | os.PathLike[str] | None


def figure_6(found: Layered, *, width: float = 6.75, height: float | None = None, style: Style = None) -> Drawing:
    """Panels A to D in one figure (paper, Figure 6): see `figure_6a`, `figure_6b`, `figure_6c` and `figure_6d`.

    `found`: from `loclin.linearize` or `loclin.explain_layers`. `width`, `height`: inches. `style`: a .mplstyle file,
    or the name of one of matplotlib's. Raises OptionError for a size or a style that there is not. Cost:
    `loclin.explain_layers` of a linearized prompt.
    """
    result = layered(found)
    with canvas("Figure 6", width, height, 5.4, style, [result], 2 * _listed(result)) as figure:
        grid = figure.add_gridspec(2, 2, wspace=0.04, hspace=0.04)
        figure.head(result)
        figure.panel(_draw_spectra(figure, grid[0, 0], result), "A")
        for letter, cell, draw in (
            ("B", grid[0, 1], _draw_path),
            ("C", grid[1, 0], _draw_ranks),
            ("D", grid[1, 1], _draw_own),
        ):
            axes = figure.add_subplot(cell)
            draw(axes, result)
            figure.panel(axes, letter)
    return figure


def figure_6a(found: Layered, *, width: float = 4.0, height: float | None = None, style: Style = None) -> Drawing:
    """Spectra of the maps from the embeddings to each layer, and their words (paper, Figure 6A; section 3.5).

    The k largest singular values of the joint map [J_0 ... J_{T-1}] to the residual stream after each layer, followed
    by the frozen final norm, divided by the largest. Beside it what the first left vector of layers writes; of a deep
    model every second one or fewer. `found`, `width`, `height`, `style`, errors: see `figure_6`.
    """
    result = layered(found)
    with canvas("Figure 6A", width, height, 2.8, style, [result], _listed(result)) as figure:
        _draw_spectra(figure, figure.add_gridspec(1, 1)[0], result)
        figure.head(result)
    return figure


def figure_6b(found: Layered, *, width: float = 3.3, height: float | None = None, style: Style = None) -> Drawing:
    """The path of projections (paper, Figure 6B; section 3.5).

    The sizes of the products of the first and second joint left vectors of each layer with those of the last layer,
    which is at (1, 1). A hollow point has near-equal singular values, so that its vectors are not defined.
    `found`, `width`, `height`, `style`, errors: see `figure_6`.
    """
    return _draw_one("Figure 6B", _draw_path, found, width, height, style)


def figure_6c(found: Layered, *, width: float = 3.3, height: float | None = None, style: Style = None) -> Drawing:
    """The stable rank of the joint maps from the embeddings to each layer (paper, Figure 6C; section 3.5).

    R = sum of S_i^2 / S_max^2, of the maps to the residual stream, the attention's output and the MLP's, each followed
    by the frozen final norm. `found`, `width`, `height`, `style`, errors: see `figure_6`.
    """
    return _draw_one("Figure 6C", _draw_ranks, found, width, height, style)


def figure_6d(found: Layered, *, width: float = 3.3, height: float | None = None, style: Style = None) -> Drawing:
    """The stable rank of each layer's own joint map, from its input (paper, Figure 6D; section 3.5).

    Points as in `figure_6c`. `found`, `width`, `height`, `style`, errors: see `figure_6`.
    """
    return _draw_one("Figure 6D", _draw_own, found, width, height, style)


def _draw_one(title: str, draw: Any, found: Layered, width: float, height: float | None, style: Style) -> Drawing:
    result = layered(found)
    with canvas(title, width, height, 2.6, style, [result]) as figure:
        axes = figure.add_subplot()
        draw(axes, result)
        figure.head(result)
    return figure


def _listed(result: LayerExplanation) -> int:
    return min(_LISTED, result.n_layers)


def _draw_spectra(figure: Drawing, cell: SubplotSpec, result: LayerExplanation) -> Axes:
    """Draw the spectra of all layers, and the words of some; gives the axes on the left."""
    parts = cell.subgridspec(1, 2, width_ratios=(1.4, 1), wspace=0.02)
    axes, words = figure.add_subplot(parts[0]), figure.add_subplot(parts[1])
    shades = depth_colours(result.n_layers)
    for layer, (values, colour) in enumerate(zip(result.main.joint_spectra, shades, strict=True)):
        axes.plot(range(1, len(values) + 1), values, ".-", color=colour, label=f"layer {layer}")
    log_axis(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="rank", ylabel="singular value / largest")
    listed = range(result.n_layers - 1, -1, -math.ceil(result.n_layers / _LISTED))
    words.set_axis_off()
    words.set_ylim(len(listed) - 0.5, -0.5)
    for y, layer in enumerate(listed):
        blocks = result.main.joint_vectors[layer]
        label = {"color": shades[layer], "va": "center", "transform": words.get_yaxis_transform()}
        figure.write(words, 0.0, float(y), f"L{layer}", **label)
        figure.row(words, float(y), [word for word, _ in blocks[0].writes] if blocks else [], within=(0.2, 1.0))
    return axes


def _draw_path(axes: Axes, result: LayerExplanation) -> None:
    points, shades = np.array(result.main.path), depth_colours(result.n_layers)
    axes.plot(*points.T, color="0.75", zorder=0)
    for layer, (at, colour) in enumerate(zip(points, shades, strict=True)):
        filled = colour if result.main.path_defined[layer] else "white"
        axes.plot(*at[:, None], "o", color=colour, markerfacecolor=filled, label=f"layer {layer}")
        if sum(np.linalg.norm(points - at, axis=1) < _APART) == 1:
            axes.annotate(str(layer), at, xytext=(3, 2), textcoords="offset points", fontsize=5.5)
    scale = ScalarMappable(Normalize(0, result.n_layers - 1), ListedColormap(shades))
    bar = axes.figure.colorbar(scale, ax=axes, label="layer", fraction=0.05, pad=0.01)
    bar.outline.set_visible(False)
    axes.set(xlim=(-0.03, 1.08), ylim=(-0.03, 1.08))
    axes.set(xlabel="|⟨u₁, u₁ of the last layer⟩|", ylabel="|⟨u₂, u₂ of the last layer⟩|")


def _draw_ranks(axes: Axes, result: LayerExplanation) -> None:
    _draw_curves(axes, result, "joint_stable_rank", "stable rank, from the embeddings")


def _draw_own(axes: Axes, result: LayerExplanation) -> None:
    _draw_curves(axes, result, "joint_own_rank", "stable rank, of the layer's own map")


def _draw_curves(axes: Axes, result: LayerExplanation, field: str, label: str) -> None:
    for component in result.components:
        colour, mark = _MARKS[component.name]
        values = getattr(component, field)
        axes.plot(range(len(values)), values, marker=mark, color=colour, label=COMPONENTS[component.name])
    log_axis(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel=label)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, columnspacing=1)
