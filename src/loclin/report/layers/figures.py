"""Figure 6 of the paper, and the predicted word's rank with depth, in plotly; one trace for each component."""

from __future__ import annotations

from typing import Any

import numpy as np

from loclin.analyses.layers import LayerExplanation
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, PALETTE, POSITIVE, curve, draw
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
    return {
        "spectra": _spectra(found),
        "path": _path(found),
        "ranks": _ranks(found, "joint_stable_rank"),
        "own": _ranks(found, "joint_own_rank"),
        "depth": _depth(found),
    }


def depth_colour(layer: int, n_layers: int) -> str:
    """A colour for a layer's depth."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _DEPTH])
    at = 2 * layer / max(n_layers - 1, 1)
    return "#" + "".join(f"{round(float(np.interp(at, (0, 1, 2), stops[:, i]))):02x}" for i in range(3))


def _spectra(found: LayerExplanation) -> dict[str, Any]:
    """Draw each layer's largest joint singular values over the largest of all (Figure 6A)."""
    traces = [
        curve(
            range(1, len(values) + 1),
            np.array(values, dtype=np.float32),
            f"layer {layer}",
            depth_colour(layer, found.n_layers),
            mode="lines",
            line={"width": 1.5},
            meta=component.name,
            visible=component is found.main,
            hovertemplate=f"layer {layer}<br>σ%{{x}} = %{{y:.3g}} σ1<extra></extra>",
        )
        for component in found.components
        for layer, values in enumerate(component.joint_spectra)
    ]
    return draw(traces, x="singular value, the largest first", y="σ / σ1", xaxis_dtick=1, yaxis_rangemode="tozero")


def _path(found: LayerExplanation) -> dict[str, Any]:
    """Draw the way of the first two joint left vectors to the last layer's (Figure 6B)."""
    layers = range(found.n_layers)
    named = {layer for layer in layers if layer % max(1, found.n_layers // 8) == 0} | {found.n_layers - 1}
    traces = []
    for component in found.components:
        first, second = zip(*component.path, strict=True)
        marker = {
            "size": 9,
            "color": [depth_colour(layer, found.n_layers) for layer in layers],
            "symbol": ["circle" if defined else "circle-open" for defined in component.path_defined],
        }
        traces.append(
            curve(
                first,
                list(second),
                component.name,
                NEUTRAL,
                mode="lines+markers+text",
                line={"width": 1},
                marker=marker,
                text=[str(layer) if layer in named else "" for layer in layers],
                textposition="top center",
                meta=component.name,
                visible=component is found.main,
                customdata=list(layers),
                hovertemplate="layer %{customdata}<br>u1 %{x:.3f}<br>u2 %{y:.3f}<extra></extra>",
            )
        )
    x, y = ("|⟨u1, u1 of the last layer⟩|", "|⟨u2, u2 of the last layer⟩|")
    return draw(traces, x=x, y=y, xaxis_range=[-0.04, 1.06], yaxis_range=[-0.04, 1.1])


def _ranks(found: LayerExplanation, joint: str) -> dict[str, Any]:
    """Draw joint stable ranks with depth (Figures 6C and 6D), and room for a chosen token's, which the page fills."""
    traces = []
    for component in found.components:
        name = COMPONENTS[component.name]
        for chosen in (False, True):
            look = {"mode": "lines", "line": {"width": 1.5, "dash": "dot"}} if chosen else {}
            traces.append(
                curve(
                    range(found.n_layers),
                    [] if chosen else np.array(getattr(component, joint), dtype=np.float32),
                    f"{name}, the chosen token" if chosen else name,
                    _COLOURS[component.name],
                    marker={"size": 5},
                    showlegend=not chosen,
                    meta={"component": component.name, "chosen": chosen},
                    hovertemplate="layer %{x}<br>%{fullData.name}: %{y:.4g}<extra></extra>",
                    **look,
                )
            )
    rank = {"type": "log", "tickvals": _TICKS}
    return draw(traces, x="layer", y="stable rank", legend=ABOVE, xaxis_zeroline=False, yaxis=rank)


def _depth(found: LayerExplanation) -> dict[str, Any]:
    """Draw the predicted word's rank with depth: by the logit lens, and by first left vectors."""
    curves: list[tuple[str, str | None, list[Any], str]] = [
        ("logit lens", None, [layer.rank for layer in found.lens], NEUTRAL)
    ]
    for component in found.components:
        curves.append(("all tokens' map, u1", component.name, component.joint_word_rank, POSITIVE))
        curves.append(("its own token's map, u1", component.name, component.token_word_rank, NEGATIVE))
    traces = [
        curve(
            range(found.n_layers),
            ranks,
            name,
            colour,
            marker={"size": 5},
            meta=component,
            visible=component in (None, found.main.name),
            hovertemplate="layer %{x}<br>%{fullData.name}: rank %{y:,}<extra></extra>",
        )
        for name, component, ranks, colour in curves
    ]
    rank = {"type": "log", "autorange": "reversed", "dtick": 1, "tickformat": ",d"}
    return draw(traces, x="layer", y="rank, the first on top", legend=ABOVE, xaxis_zeroline=False, yaxis=rank)
