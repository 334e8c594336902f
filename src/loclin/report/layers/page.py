"""Every layer of a prompt as one HTML file that needs nothing else, and as a piece of HTML for a notebook."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from loclin.analyses.decode import Words
from loclin.analyses.explain import SingularBlock
from loclin.analyses.layers import APPEARS, SHOWN, WORDS, ComponentLayers, LayerExplanation
from loclin.report import html as parts
from loclin.report.assets import asset
from loclin.report.layers.figures import layers_figures
from loclin.report.plot import plotly_script
from loclin.report.sheet import embedded, facts, listed, sheet, shortened
from loclin.report.text import COMPONENTS, error, number, percent, sigmas, signed, visible
from loclin.results.files import write_text

_WORD = 24
_PREDICTIONS = 7
_MOST = 300_000
"""Words of single tokens' maps that a page holds; a browser takes a few megabytes well."""


def layers_html(found: LayerExplanation) -> str:
    """Write every layer of a prompt as a self-contained, interactive HTML page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    cut, vocabulary = _cut(found), _Vocabulary({})
    data = {
        "figures": {name: json.loads(figure.to_json()) for name, figure in layers_figures(found).items()},
        "tokens": [visible(text) for text in found.tokens],
        "position": found.settings["position"],
        "target": visible(found.target["text"], _WORD),
        "components": [_component(component, cut, vocabulary) for component in found.components],
        "lens": [
            {"words": vocabulary.of(layer.words), "probability": percent(layer.probability), "rank": layer.rank}
            for layer in found.lens
        ],
        "words": list(vocabulary.numbers),
        "scored": cut.scored,
    }
    script = asset("shared.js", "layers.js")
    title = shortened(found.prompt)
    target = parts.token(found.target["text"])
    chips = "".join(_chip(i, text, i in found.sinks) for i, text in enumerate(found.tokens))
    return sheet(
        title=title,
        about="every layer, at this prompt, as an exact linear map",
        heading=f'{escape(title)} <span class="arrow" aria-label="continues with">→</span> '
        f'<span class="word">{target}</span>',
        lead=f'<div class="chips" role="group" aria-label="The prompt\'s tokens: choose one">'
        f'<button class="chip" style="--a:0" type="button" data-token="-1" aria-pressed="false">all tokens</button>'
        f'{chips}</div><p class="key"><span class="swatch sink"></span> attention sink · the chosen token\'s maps are '
        f"in the table, and dotted in C and D</p>{parts.warnings(found)}",
        body=Template(asset("layers.html")).substitute(
            target=target,
            probability=percent(found.target["probability"]),
            predictions=parts.predictions(found, _PREDICTIONS),
            appearances=_appearances(found),
            verdict=verdict(found),
            components=_options([COMPONENTS[c.name] for c in found.components], len(found.components) - 1),
            tokens=_options([f"{i} {visible(text, _WORD)}" for i, text in enumerate(found.tokens)]),
            left_out=_left_out(cut, found),
        ),
        settings=facts(found.model, found.settings),
        scripts=f'<script type="application/json" id="data">{embedded(data)}</script>'
        f"<script>{plotly_script()}</script><script>{script}</script>",
    )


def write_layers(found: LayerExplanation, path: str | os.PathLike[str]) -> None:
    """Write the page to a file, whole or not at all.

    Raises
    ------
    OutputError
        When plotly is not installed or the file cannot be written.
    """
    write_text(path, layers_html(found))


def layers_fragment(found: LayerExplanation) -> str:
    """Write every layer in a row, as a compact piece of HTML for a notebook's output, without scripts."""
    style = asset("notebook.css")
    shown, position = found.main, found.settings["position"]
    heads = ("layer", "stable rank", "own", "all tokens write (σ1)", "this token writes (σ1)", "logit lens", "rank")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(
        f'<tr><td class="num">{layer}</td><td class="num">{shown.joint_stable_rank[layer]:.2f}</td>'
        f'<td class="num">{shown.joint_own_rank[layer]:.3g}</td>'
        f"<td>{_first(shown.joint_vectors[layer])}</td><td>{_first(shown.token_vectors[layer][position])}</td>"
        f'<td>{_plain(lens.words)}</td><td class="num">{lens.rank:,}</td></tr>'
        for layer, lens in enumerate(found.lens)
    )
    return (
        f'<div class="loclin"><style>{style}</style>{parts.predictions(found, _PREDICTIONS)}{verdict(found)}'
        f'{parts.warnings(found)}<p class="note">{COMPONENTS[shown.name]}</p><div class="scroll">'
        f'<table class="tokens"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def verdict(found: LayerExplanation) -> str:
    """Write in a line whether all maps are exact, and how far each component's are off at most."""
    kind, name = ("exact", "EXACT") if found.passed else ("inexact", "NOT EXACT")
    count = 2 * found.n_layers * len(found.components)
    each = ", ".join(f"{COMPONENTS[c.name]} {error(c.largest_error)}" for c in found.components)
    return (
        f'<p class="verdict {kind}"><strong>{name}</strong> largest reconstruction error |Jx + b − y| / |y| of '
        f"{count} maps {error(found.largest_error)}, at most {error(found.tolerance)} ({each}).</p>"
    )


def _first(blocks: list[SingularBlock]) -> str:
    return _plain(blocks[0].writes) if blocks else '<span class="note">the map is zero</span>'


def _plain(words: Words) -> str:
    return " ".join(f'<span class="word">{parts.token(text, _WORD)}</span>' for text, _ in words)


def _chip(index: int, text: str, is_sink: bool) -> str:
    end = "<br>" if text.endswith("\n") else ""
    kind = "chip sink" if is_sink else "chip"
    return (
        f'<button class="{kind}" style="--a:0" type="button" data-token="{index}" aria-pressed="false">'
        f"{parts.token(text)}</button>{end}"
    )


def _options(names: list[str], chosen: int | None = None) -> str:
    return "".join(
        f'<option value="{i}"{" selected" if i == chosen else ""}>{escape(name)}</option>'
        for i, name in enumerate(names)
    )


def _appearances(found: LayerExplanation) -> str:
    """Say where the predicted word first appears, by each way of reading."""
    shown = found.main.name
    readers = {"lens": "logit lens", f"{shown} joint": "all tokens' map, u1", f"{shown} token": "its own token's, u1"}

    def said(layer: int | None) -> str:
        return "never" if layer is None else f"layer {layer}"

    return listed(
        {
            name: f"{said(found.appears[key])}; the first: {said(found.leads[key])}"
            if found.appears[key] is not None
            else f"never among the first {APPEARS}"
            for key, name in readers.items()
        }
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
    if 2 * maps * len(found.tokens) * SHOWN * WORDS <= _MOST:
        return _Cut()
    vectors, words = 1, 3
    most = _MOST // (2 * maps * vectors * words)
    return _Cut(max(0, found.settings["position"] + 1 - most), vectors, words, scored=False)


def _left_out(cut: _Cut, found: LayerExplanation) -> str:
    """Say what the page leaves out, and where it is."""
    if cut == _Cut():
        return ""
    earlier = f", and tokens 0 to {cut.first - 1} nothing" if cut.first else ""
    return (
        f'<p class="warning" role="note">This prompt has {len(found.tokens)} tokens. To keep the page small, a single '
        f"token's map shows its first vector and {cut.words} words a side, without scores{earlier}. All of it is in "
        "the JSON: <code>loclin layers --json</code>, or <code>to_json()</code>.</p>"
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
