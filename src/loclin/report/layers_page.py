"""Every layer of a prompt as an interactive page: a component and a token are chosen, and their maps are shown.

Its figures are those of Figure 6 of the paper, and the predicted word's rank with depth. A trace's `meta` says which
component it is of; the page shows those of the one that is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loclin.analyses.decode import SingularBlock, Words
from loclin.analyses.layers import SHOWN, WORDS, ComponentLayers, LayerExplanation
from loclin.report import run
from loclin.report.html import write_page
from loclin.report.layers import describe_layers
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, PALETTE, POSITIVE, curve, draw
from loclin.report.text import COMPONENTS, number, percent, sigmas, signed, visible

_WORD = 24
_MOST = 300_000
"""Words of single tokens' maps that a page holds; a browser takes a few megabytes well."""
_COLOURS = dict(zip(("resid_post", "attn_out", "mlp_out"), (POSITIVE, NEGATIVE, PALETTE[2]), strict=True))
_DEPTH = ("#3b82f6", "#a855f7", "#ea6a12")
"""The first layer's colour, the middle's and the last's: each can be seen on light and on dark."""
_TICKS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]


def page(found: LayerExplanation) -> str:
    """Write every layer of a prompt as a self-contained, interactive HTML page."""
    cut, texts = _cut(found), run.tokens(found)
    vocabulary: dict[str, int] = {}
    data = {
        "figures": {
            "spectra": _spectra(found),
            "path": _path(found),
            "ranks": _ranks(found, "joint_stable_rank"),
            "own": _ranks(found, "joint_own_rank"),
            "depth": _depth(found),
        },
        "tokens": [visible(text) for text in texts],
        "position": found.provenance.position,
        "target": visible(found.target["text"], _WORD),
        "components": [_component(component, cut, vocabulary) for component in found.components],
        "lens": [
            {"words": _numbered(layer.words, vocabulary), "probability": percent(layer.probability), "rank": layer.rank}
            for layer in found.lens
        ],
        "words": list(vocabulary),
        "scored": cut.scored,
    }
    return write_page(
        "layers.html",
        describe_layers(found),
        data,
        "layers.js",
        found=found,
        components=[COMPONENTS[component.name] for component in found.components],
        names=[f"{i} {visible(text, _WORD)}" for i, text in enumerate(texts)],
        left_out="" if cut.scored else _left_out(cut, len(texts)),
    )


@dataclass(frozen=True)
class _Cut:
    """What a page holds of single tokens' maps: tokens from `first` on, so many vectors and words, scores or none."""

    first: int = 0
    vectors: int = SHOWN
    words: int = WORDS
    scored: bool = True


def _cut(found: LayerExplanation) -> _Cut:
    """All, if that is not too much; else three words of the first vectors, of the last tokens."""
    sides = 2 * len(found.components) * found.n_layers
    if sides * len(run.tokens(found)) * SHOWN * WORDS <= _MOST:
        return _Cut()
    vectors, words = 1, 3
    return _Cut(
        max(0, found.provenance.position + 1 - _MOST // (sides * vectors * words)), vectors, words, scored=False
    )


def _left_out(cut: _Cut, length: int) -> str:
    earlier = f", and tokens 0 to {cut.first - 1} nothing" if cut.first else ""
    return (
        f"This prompt has {length} tokens. To keep the page small, a single token's map shows its first vector and "
        f"{cut.words} words a side, without scores{earlier}. All of it is in the JSON: loclin layers --json, or "
        "to_json()."
    )


def _numbered(words: Words, vocabulary: dict[str, int], scored: bool = True) -> list[int | float]:
    """Words as numbers, for the page writes each once; behind each its score, or none."""
    pairs = [(vocabulary.setdefault(visible(text, _WORD), len(vocabulary)), score) for text, score in words]
    return [part for index, score in pairs for part in ((index, float(f"{score:.3g}")) if scored else (index,))]


def _component(component: ComponentLayers, cut: _Cut, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Give what the page shows of a component: its maps in words, numbers ready to be shown."""
    return {
        "name": component.name,
        "title": COMPONENTS[component.name],
        "joint": [_map(blocks, _Cut(), vocabulary) for blocks in component.joint_vectors],
        "rank": [number(rank) for rank in component.joint_stable_rank],
        "tokens": [
            None if i < cut.first else [_map(blocks, cut, vocabulary) for blocks in layers]
            for i, layers in enumerate(zip(*component.token_vectors, strict=True))
        ],
        "ranks": _by_token(component.token_stable_rank),
        "own": _by_token(component.token_own_rank),
    }


def _by_token(ranks: list[list[float]]) -> list[list[float | None]]:
    """Each token's stable ranks with depth; a zero map has none."""
    return [[float(f"{rank:.5g}") or None for rank in token] for token in zip(*ranks, strict=True)]


def _map(blocks: list[SingularBlock], cut: _Cut, vocabulary: dict[str, int]) -> list[list[Any]]:
    """Give a map's blocks: name, values, gain, and what it writes and reads; lists are shorter than names."""
    return [
        [
            sigmas(block.indices),
            ", ".join(map(number, block.values)),
            None if block.gain is None else signed(block.gain),
            _numbered(block.writes[: cut.words], vocabulary, cut.scored),
            _numbered(block.reads[: cut.words], vocabulary, cut.scored),
        ]
        for block in blocks[: cut.vectors]
    ]


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
    layers = list(range(found.n_layers))
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
                customdata=layers,
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
                _with_depth(
                    [] if chosen else np.array(getattr(component, joint), dtype=np.float32),
                    f"{name}, the chosen token" if chosen else name,
                    _COLOURS[component.name],
                    "%{y:.4g}",
                    found.n_layers,
                    showlegend=not chosen,
                    meta={"component": component.name, "chosen": chosen},
                    **look,
                )
            )
    return _drawn_with_depth(traces, "stable rank", {"tickvals": _TICKS})


def _depth(found: LayerExplanation) -> dict[str, Any]:
    """Draw the predicted word's rank with depth: by the logit lens, and by first left vectors."""
    curves: list[tuple[str, str | None, list[Any], str]] = [
        ("logit lens", None, [layer.rank for layer in found.lens], NEUTRAL)
    ]
    for component in found.components:
        curves.append(("all tokens' map, u1", component.name, component.joint_word_rank, POSITIVE))
        curves.append(("its own token's map, u1", component.name, component.token_word_rank, NEGATIVE))
    visible = (None, found.main.name)
    traces = [
        _with_depth(ranks, name, colour, "rank %{y:,}", found.n_layers, meta=component, visible=component in visible)
        for name, component, ranks, colour in curves
    ]
    rank = {"autorange": "reversed", "dtick": 1, "tickformat": ",d"}
    return _drawn_with_depth(traces, "rank, the first on top", rank)


def _with_depth(y: Any, name: str, colour: str, value: str, n_layers: int, **more: Any) -> dict[str, Any]:
    about = f"layer %{{x}}<br>%{{fullData.name}}: {value}<extra></extra>"
    return curve(range(n_layers), y, name, colour, marker={"size": 5}, hovertemplate=about, **more)


def _drawn_with_depth(traces: list[dict[str, Any]], y: str, axis: dict[str, Any]) -> dict[str, Any]:
    return draw(traces, x="layer", y=y, legend=ABOVE, xaxis_zeroline=False, yaxis={"type": "log"} | axis)
