"""Every layer of a prompt as an interactive page: a component and a token are chosen, and their maps are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loclin.analyses.decode import SingularBlock, Words
from loclin.analyses.layers import SHOWN, WORDS, ComponentLayers, LayerExplanation
from loclin.report import run
from loclin.report.html import write_page
from loclin.report.layers.figures import layers_figures
from loclin.report.layers.sheet import appearances, describe_layers
from loclin.report.text import COMPONENTS, number, percent, sigmas, signed, token, visible

_WORD = 24
_MOST = 300_000
"""Words of single tokens' maps that a page holds; a browser takes a few megabytes well."""


def layers_page(found: LayerExplanation) -> str:
    """Write every layer of a prompt as a self-contained, interactive HTML page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    sheet, cut, vocabulary = describe_layers(found), _cut(found), _Vocabulary({})
    texts = run.tokens(found)
    data = {
        "figures": layers_figures(found),
        "tokens": [visible(text) for text in texts],
        "position": run.position(found),
        "target": visible(found.target["text"], _WORD),
        "components": [_component(component, cut, vocabulary) for component in found.components],
        "lens": [
            {"words": vocabulary.of(layer.words), "probability": percent(layer.probability), "rank": layer.rank}
            for layer in found.lens
        ],
        "words": list(vocabulary.numbers),
        "scored": cut.scored,
    }
    return write_page(
        "layers.html",
        sheet,
        data,
        "layers.js",
        found=found,
        target=token(found.target["text"]),
        appearances=appearances(found),
        rows=sheet.sections[0],
        components=[COMPONENTS[component.name] for component in found.components],
        names=[f"{i} {visible(text, _WORD)}" for i, text in enumerate(texts)],
        left_out=_left_out(cut, len(texts)),
    )


@dataclass(frozen=True)
class _Cut:
    """What a page holds of single tokens' maps: tokens from `first` on, so many vectors and words, scores or none."""

    first: int = 0
    vectors: int = SHOWN
    words: int = WORDS
    scored: bool = True


def _cut(found: LayerExplanation) -> _Cut:
    """All, if that is not too much; else a word or three of the first vectors, of the last tokens."""
    maps = len(found.components) * found.n_layers
    if 2 * maps * len(run.tokens(found)) * SHOWN * WORDS <= _MOST:
        return _Cut()
    vectors, words = 1, 3
    most = _MOST // (2 * maps * vectors * words)
    return _Cut(max(0, run.position(found) + 1 - most), vectors, words, scored=False)


def _left_out(cut: _Cut, length: int) -> str:
    """Say what the page leaves out, and where it is."""
    if cut == _Cut():
        return ""
    earlier = f", and tokens 0 to {cut.first - 1} nothing" if cut.first else ""
    return (
        f"This prompt has {length} tokens. To keep the page small, a single token's map shows its first vector and "
        f"{cut.words} words a side, without scores{earlier}. All of it is in the JSON: loclin layers --json, or "
        "to_json()."
    )


@dataclass(frozen=True)
class _Vocabulary:
    """The page's words, each written once; elsewhere they are numbers."""

    numbers: dict[str, int]

    def of(self, words: Words, scored: bool = True) -> list[int | float]:
        """Words as numbers, each with its score behind it, or without."""
        pairs = [(self.numbers.setdefault(visible(text, _WORD), len(self.numbers)), score) for text, score in words]
        return [part for index, score in pairs for part in ((index, float(f"{score:.3g}")) if scored else (index,))]


def _component(component: ComponentLayers, cut: _Cut, vocabulary: _Vocabulary) -> dict[str, Any]:
    """Give what the page shows of a component: its maps in words, numbers ready to be shown."""
    tokens = list(zip(*component.token_vectors, strict=True))
    return {
        "name": component.name,
        "title": COMPONENTS[component.name],
        "joint": [_map(blocks, _Cut(), vocabulary) for blocks in component.joint_vectors],
        "rank": [number(rank) for rank in component.joint_stable_rank],
        "tokens": [
            None if i < cut.first else [_map(blocks, cut, vocabulary) for blocks in layers]
            for i, layers in enumerate(tokens)
        ],
        "ranks": _by_token(component.token_stable_rank),
        "own": _by_token(component.token_own_rank),
    }


def _by_token(ranks: list[list[float]]) -> list[list[float | None]]:
    """Each token's stable ranks with depth; a zero map has none."""
    return [[float(f"{rank:.5g}") or None for rank in token] for token in zip(*ranks, strict=True)]


def _map(blocks: list[SingularBlock], cut: _Cut, vocabulary: _Vocabulary) -> list[list[Any]]:
    """Give a map's blocks: name, values, gain, and what it writes and reads; lists are shorter than names."""
    return [
        [
            sigmas(block.indices),
            ", ".join(number(value) for value in block.values),
            None if block.gain is None else signed(block.gain),
            vocabulary.of(block.writes[: cut.words], cut.scored),
            vocabulary.of(block.reads[: cut.words], cut.scored),
        ]
        for block in blocks[: cut.vectors]
    ]
