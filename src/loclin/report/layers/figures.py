"""Figure 6 of the paper, and the predicted word's rank with depth, in plotly; one trace for each component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loclin.analyses.layers import ComponentLayers, LayerExplanation
from loclin.report.plot import NEGATIVE, NEUTRAL, PALETTE, POSITIVE, graph_objects, plain
from loclin.report.text import COMPONENTS

_COLOURS = dict(zip(("resid_post", "attn_out", "mlp_out"), (POSITIVE, NEGATIVE, PALETTE[2]), strict=True))
_DEPTH = ("#3b82f6", "#a855f7", "#ea6a12")
"""The first layer's colour, the middle's and the last's: each can be seen on light and on dark."""


_TICKS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]


def layers_figures(found: LayerExplanation) -> dict[str, Any]:
    """Draw the figures, by the name of the place they go to.

    A trace's `meta` says which component it is of, and, in `depth`, whether it is the token's own map's; the page shows
    those of the one that is chosen.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    go = graph_objects()
    drawn = {
        "spectra": _spectra(found, go),
        "path": _path(found, go),
        "ranks": _ranks(found, go, "joint_stable_rank"),
        "own": _ranks(found, go, "joint_own_rank"),
        "depth": _depth(found, go),
    }
    for figure in drawn.values():
        figure.update_layout(**plain())
    return drawn


def depth_colour(layer: int, n_layers: int) -> str:
    """A colour for a layer's depth."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _DEPTH])
    at = 2 * layer / max(n_layers - 1, 1)
    return "#" + "".join(f"{round(float(np.interp(at, (0, 1, 2), stops[:, i]))):02x}" for i in range(3))


def _is_shown(found: LayerExplanation, component: ComponentLayers) -> bool:
    return component is found.main


def _spectra(found: LayerExplanation, go: Any) -> Any:
    """Draw each layer's largest joint singular values over the largest of all (Figure 6A)."""
    figure = go.Figure()
    for component in found.components:
        for layer, values in enumerate(component.joint_spectra):
            figure.add_trace(
                go.Scatter(
                    x=list(range(1, len(values) + 1)),
                    y=np.array(values, dtype=np.float32),
                    mode="lines",
                    line={"color": depth_colour(layer, found.n_layers), "width": 1.5},
                    name=f"layer {layer}",
                    meta=component.name,
                    visible=_is_shown(found, component),
                    hovertemplate=f"layer {layer}<br>σ%{{x}} = %{{y:.3g}} σ1<extra></extra>",
                )
            )
    figure.update_layout(showlegend=False, margin={"l": 60, "r": 12, "t": 12, "b": 48})
    figure.update_xaxes(title="singular value, the largest first", dtick=1)
    figure.update_yaxes(title="σ / σ1", rangemode="tozero")
    return figure


def _path(found: LayerExplanation, go: Any) -> Any:
    """Draw the way of the first two joint left vectors to the last layer's (Figure 6B)."""
    figure = go.Figure()
    layers = range(found.n_layers)
    named = {layer for layer in layers if layer % max(1, found.n_layers // 8) == 0} | {found.n_layers - 1}
    for component in found.components:
        first, second = zip(*component.path, strict=True)
        figure.add_trace(
            go.Scatter(
                x=list(first),
                y=list(second),
                mode="lines+markers+text",
                line={"color": NEUTRAL, "width": 1},
                marker={
                    "size": 9,
                    "color": [depth_colour(layer, found.n_layers) for layer in layers],
                    "symbol": ["circle" if defined else "circle-open" for defined in component.path_defined],
                },
                text=[str(layer) if layer in named else "" for layer in layers],
                textposition="top center",
                meta=component.name,
                visible=_is_shown(found, component),
                customdata=list(layers),
                hovertemplate="layer %{customdata}<br>u1 %{x:.3f}<br>u2 %{y:.3f}<extra></extra>",
            )
        )
    figure.update_layout(showlegend=False, margin={"l": 60, "r": 12, "t": 12, "b": 48})
    figure.update_xaxes(title="|⟨u1, u1 of the last layer⟩|", range=[-0.04, 1.06])
    figure.update_yaxes(title="|⟨u2, u2 of the last layer⟩|", range=[-0.04, 1.1])
    return figure


def _ranks(found: LayerExplanation, go: Any, joint: str) -> Any:
    """Draw joint stable ranks with depth (Figures 6C and 6D), and room for a chosen token's, which the page fills."""
    figure = go.Figure()
    layers = list(range(found.n_layers))
    for component in found.components:
        colour, name = _COLOURS[component.name], COMPONENTS[component.name]
        for chosen in (False, True):
            figure.add_trace(
                go.Scatter(
                    x=layers,
                    y=[] if chosen else np.array(getattr(component, joint), dtype=np.float32),
                    mode="lines" if chosen else "lines+markers",
                    line={"color": colour, "width": 1.5 if chosen else 2, "dash": "dot" if chosen else "solid"},
                    marker={"size": 5},
                    name=f"{name}, the chosen token" if chosen else name,
                    showlegend=not chosen,
                    meta={"component": component.name, "chosen": chosen},
                    hovertemplate="layer %{x}<br>%{fullData.name}: %{y:.4g}<extra></extra>",
                )
            )
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 12, "t": 44, "b": 48},
    )
    figure.update_xaxes(title="layer", zeroline=False)
    figure.update_yaxes(title="stable rank", type="log", tickvals=_TICKS)
    return figure


def _depth(found: LayerExplanation, go: Any) -> Any:
    """Draw the predicted word's rank with depth: by the logit lens, and by first left vectors."""
    figure = go.Figure()
    layers = list(range(found.n_layers))
    curves: list[tuple[str, str | None, Sequence[int | None], str]] = [
        ("logit lens", None, [layer.rank for layer in found.lens], NEUTRAL)
    ]
    for component in found.components:
        curves.append(("all tokens' map, u1", component.name, component.joint_word_rank, POSITIVE))
        curves.append(("its own token's map, u1", component.name, component.token_word_rank, NEGATIVE))
    for name, component_name, ranks, colour in curves:
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=ranks,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 5},
                name=name,
                meta=component_name,
                visible=component_name in (None, found.main.name),
                hovertemplate="layer %{x}<br>%{fullData.name}: rank %{y:,}<extra></extra>",
            )
        )
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 70, "r": 12, "t": 44, "b": 48},
    )
    figure.update_xaxes(title="layer", zeroline=False)
    figure.update_yaxes(title="rank, the first on top", type="log", autorange="reversed", dtick=1, tickformat=",d")
    return figure
