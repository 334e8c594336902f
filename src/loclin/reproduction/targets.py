"""Each figure and table of the paper: which analyses it is made of, how it is drawn, and what it is compared with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loclin.analyses.explain import Explanation
from loclin.analyses.layers import LayerExplanation
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.report.text import error, number, plain, visible
from loclin.reproduction.compare import compare, compare_steering
from loclin.reproduction.result import Compared, Grid
from loclin.reproduction.sources import Sources

Kind = Literal["maps", "explain", "layers", "steering"]
FORMS = (".svg", ".pdf", ".png")
"""The files of a figure; a page shows the first."""
_TOP = 5


@dataclass
class Made:
    """What a target is made of, before it is recorded."""

    files: list[str] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    passed: bool = True
    exact: str = ""

    __repr__ = brief

    def draw(self, folder: Path, stem: str, figure: Any, caption: str) -> None:
        """Write a figure in all forms, and keep the first for the page."""
        for suffix in FORMS:
            figure.save(folder / f"{stem}{suffix}")
            self.files.append(f"{stem}{suffix}")
        self.images[f"{stem}.svg"] = caption
        self.warnings += figure.warnings

    def tabulate(self, folder: Path, stem: str, table: Any, *, as_published: str = "") -> None:
        """Write a table of words in three forms, and keep it for the page; `as_published`: what is wrong in it."""
        for suffix in (".md", ".tex", ".html"):
            table.save(folder / f"{stem}{suffix}")
            self.files.append(f"{stem}{suffix}")
        rows = [
            [_cell(row.name), *([(word, _mark(table, word)) for word in cell] for cell in row.cells)]
            for row in table.rows
        ]
        caption = f"As published: {as_published}. {table.caption}" if as_published else table.caption
        self.grids.append(Grid(caption, ["", *table.tokens], rows, table.legend, bool(as_published)))
        self.warnings += table.warnings

    def certify(self, found: Sequence[Explanation]) -> None:
        """Say how exact the maps of explanations are."""
        certificates = [one.certificate for one in found]
        self.passed = all(one.passed for one in certificates)
        largest = max(certificates, key=lambda one: one.reconstruction_error)
        self.exact = f"reconstruction {error(largest.reconstruction_error)}, std {error(largest.std_error)}"


@dataclass(frozen=True)
class About:
    """A target: a line about it, the analysis that it needs, and how it is made."""

    about: str
    kind: Kind
    make: Callable[[Sources, str, bool], Made]
    mistakes: bool = False  # whether the published code makes some in it

    __repr__ = brief


def _cell(*words: str) -> list[tuple[str, int]]:
    return [(word, -1) for word in words]


def _mark(table: Any, word: str) -> int:
    found = table.mark(word)
    return -1 if found is None else int(found)


def _figures() -> Any:
    """Import the drawing room when something is drawn: without matplotlib its own error says what to install."""
    from loclin import figures

    return figures


def _compare(sources: Sources, name: str, found: Iterable[Explanation | LayerExplanation]) -> list[Compared]:
    """Compare what was found at each prompt with what is published of this model for a target."""
    return [
        compare(one, result, sources.precision)
        for result, prompt in zip(found, sources.prompts(name), strict=False)
        for one in sources.published(name)
        if one.prompt == prompt
    ]


def _make_fig2(sources: Sources, name: str, _as_published: bool) -> Made:
    lins, made = sources.grow(), Made()
    figure = _figures().figure_2(lins)
    made.draw(sources.folder.path, name, figure, "The map of every token for growing prompts, and their spectra")
    certificates = [lin.certify() for lin in lins]
    made.passed = all(one.passed for one in certificates)
    made.exact = f"reconstruction {error(max(one.reconstruction_error for one in certificates))}"
    made.warnings += sources.notes
    return made


def _explained(sources: Sources, name: str) -> tuple[list[Explanation], Made]:
    """The explanations that a target is drawn from, and what is known of it then."""
    found, made = [sources.explain(prompt) for prompt in sources.prompts(name)], Made()
    made.certify(found)
    made.compared = _compare(sources, name, found)
    return found, made


def _make_fig3(sources: Sources, name: str, _as_published: bool) -> Made:
    found, made = _explained(sources, name)
    made.draw(sources.folder.path, name, _figures().figure_3(found), "Output and reconstruction")
    rows = [
        [*map(_cell, (sources.model.info.name, sources.weights, plain(one.prompt)))]
        + [_cell(visible(one.predictions[0][0])), _cell(error(one.certificate.std_error))]
        for one in found
    ]
    published: dict[tuple[str, str, str], dict[str, str]] = {}
    for figure in sources.golden.figures:
        if figure.kind in ("prediction", "error"):
            said = error(figure.value) if isinstance(figure.value, float) else str(figure.value)
            published.setdefault((figure.model, figure.dtype, figure.prompt), {})[figure.kind] = said
    rows += [
        [*map(_cell, key), _cell(known.get("prediction", "")), _cell(known.get("error", ""))]
        for key, known in published.items()
    ]
    caption = "Predictions and std(error) / std(y): ours in the first rows, the published ones below"
    made.grids.append(Grid(caption, ["model", "dtype", "prompt", "next token", "error"], rows))
    return made


def _make_fig4(sources: Sources, name: str, as_published: bool) -> Made:
    found, made = _explained(sources, name)
    figures = _figures()
    made.draw(
        sources.folder.path, f"{name}a", figures.figure_4a(found[0]), "A: the largest rows and columns of each token"
    )
    made.draw(sources.folder.path, f"{name}b", figures.figure_4b(found[0]), "B: singular vectors of each token")
    if as_published:
        made.grids += _list_mistakes(sources, found[0])
    return made


def _list_mistakes(sources: Sources, found: Explanation) -> list[Grid]:
    """The published lists of rows and right singular vectors, beside the right ones."""
    wrong = sources.repeat_mistakes()
    rows, reads = [], []
    for right, token in zip(found.tokens, wrong.tokens, strict=True):
        name = visible(right.text)
        for i, (unit, words) in enumerate(zip(token.units, token.rows, strict=True)):
            own = right.rows[i] if i < len(right.rows) else None
            shown = [] if own is None else [f"#{own.index}", *(visible(word) for word, _ in own.words[:_TOP])]
            rows.append([_cell(name), _cell(*shown), _cell(f"#{unit}", *map(visible, words))])
        for i, words in enumerate(token.reads):
            block = next((block for block in right.blocks if i in block.indices), None)
            shown = [] if block is None else [visible(word) for word, _ in block.reads]
            reads.append([_cell(name), _cell(f"v{i + 1}"), _cell(*shown), _cell(*map(visible, words))])
    return [
        Grid(
            "Largest rows: by their own norms (right), and as published: chosen by the norms of columns, and with "
            "lists that are merged wrongly",
            ["token", "largest rows, and what they read", "as published"],
            rows,
            as_published=True,
        ),
        Grid(
            "Right singular vectors: the nearest input embeddings (right), and as published: lists that are merged "
            "wrongly behind their first word",
            ["token", "", "nearest embeddings", "as published"],
            reads,
            as_published=True,
        ),
    ]


def _make_fig5(sources: Sources, name: str, _as_published: bool) -> Made:
    found, made = _explained(sources, name)
    made.draw(sources.folder.path, name, _figures().figure_5(found), "Singular vectors of each token")
    rows = [
        [_cell(sources.model.info.name), _cell(sources.weights), _cell(plain(one.prompt))]
        + [_cell(*(number(token.singular_values[0]) for token in one.tokens))]
        for one in found
    ]
    rows += [
        [*map(_cell, (one.model, one.dtype, one.prompt)), _cell(*(number(float(value)) for value in one.value))]
        for one in sources.golden.figures
        if one.kind == "s0" and isinstance(one.value, list)
    ]
    caption = "The largest singular value of each token's map: ours in the first rows, the published ones below"
    made.grids.append(Grid(caption, ["model", "dtype", "prompt", "token by token"], rows))
    return made


def _make_fig_a1(sources: Sources, name: str, _as_published: bool) -> Made:
    found, made = _explained(sources, name)
    made.draw(sources.folder.path, name, _figures().figure_a1(found[0]), "Reconstruction and singular vectors")
    return made


def _layered(sources: Sources, name: str) -> tuple[LayerExplanation, Made]:
    found = sources.explain_layers()
    exact = f"largest error {error(found.largest_error)} of the maps of {found.n_layers} layers"
    return found, Made(compared=_compare(sources, name, [found]), passed=found.passed, exact=exact)


def _make_fig6(sources: Sources, name: str, _as_published: bool) -> Made:
    found, made = _layered(sources, name)
    made.draw(sources.folder.path, name, _figures().figure_6(found), "Spectra, path and stable ranks, layer by layer")
    model = next(one for one in sources.golden.models if sources.golden.of(one.name, "fig6"))
    rows = []
    for kind, what, ranks in (
        ("rank", "up to the layer", found.main.joint_stable_rank),
        ("own_rank", "the layer alone", found.main.joint_own_rank),
    ):
        for one in sources.golden.of(model.name, "fig6"):
            if one.kind == kind and isinstance(one.at, int) and isinstance(one.value, float):
                ours = max(0, round(one.at / model.layers * found.n_layers) - 1)
                cells = (what, f"{one.at} of {model.layers}", number(one.value))
                rows.append([*map(_cell, cells), _cell(f"{ours + 1} of {found.n_layers}"), _cell(number(ranks[ours]))])
    caption = (
        f"Stable ranks of {model.name} as published (read off a plot), and ours at the same relative depth; layers "
        "are counted from 1"
    )
    made.grids.append(Grid(caption, ["map", "layer", "published", "layer", "ours"], rows))
    return made


def _make_table(sources: Sources, name: str, as_published: bool) -> Made:
    found, made = _layered(sources, name)
    draw = getattr(_figures(), f"table_{name.removeprefix('table')}")
    table = draw(found)
    made.tabulate(sources.folder.path, name, table)
    layers = sorted({row.layer for row in table.rows} - {found.n_layers - 1})
    if as_published and TARGETS[name].mistakes and layers:
        wrong = draw(found, layers=layers, highlight=table.legend)
        made.tabulate(sources.folder.path, f"{name}-as-published", wrong, as_published="the last layer is left out")
    return made


def _make_steering(sources: Sources, _name: str, as_published: bool) -> Made:
    made, n_layers = Made(), sources.n_layers
    for i, setting in enumerate(sources.settings):
        layer = setting.place(n_layers)
        found = sources.steer(i, setting, layer)
        own = sources.paper_model is not None and sources.paper_model.name == setting.model
        if own:
            made.compared += compare_steering(setting, found)
        rows = [
            _say("unsteered", found.normal.text, setting.normal or "not published for this prompt"),
            _say("steered", found.steered.text, setting.steered),
        ]
        printed = setting.printed_place(n_layers)
        if as_published and printed != layer:
            other = sources.steer(i, setting, printed)
            told = f"at the printed layer, {setting.printed_layer} (here {printed + 1} of {n_layers})"
            rows.append(_say(told, other.steered.text, "not run by the author"))
        caption = (
            f"“{setting.prompt}” steered towards “{setting.toward}” behind layer {layer + 1} of {n_layers}, "
            f"λ = {setting.strength:g}"
        )
        if not own:
            caption += f": the setting of {setting.model} (layer {setting.layer} of {setting.layers}), carried over"
        made.grids.append(Grid(caption, ["", "this model", setting.model], rows, as_published=len(rows) > 2))
    made.exact = "the published operator: maps to a layer's output with the final norm, added at its input"
    return made


def _say(name: str, ours: str, published: str) -> list[list[tuple[str, int]]]:
    return [_cell(name), _cell(plain(ours)), _cell(plain(published))]


_PAPER_TABLES = {
    1: "Llama 3.1 8B", 2: "Qwen 3 8B", 3: "Gemma 3 4B", 5: "Llama 3.1 8B", 6: "Gemma 3 4B", 7: "Qwen 3 8B"
}  # fmt: skip
_VECTORS = "the first three vectors of each token, layer by layer, in words"
TARGETS: dict[str, About] = {
    "fig2": About("the map of every token for growing prompts", "maps", _make_fig2),
    "fig3": About("output and reconstruction, frozen and ordinary", "explain", _make_fig3),
    "fig4": About("rows, columns and singular vectors of each token, in words", "explain", _make_fig4, mistakes=True),
    "fig5": About("singular vectors of each token", "explain", _make_fig5),
    "fig6": About("spectra, path and stable ranks, layer by layer", "layers", _make_fig6),
    "figA1": About("reconstruction and singular vectors", "explain", _make_fig_a1),
    **{
        f"table{n}": About(f"{_VECTORS} (the paper's is of {of})", "layers", _make_table, mistakes=n > 3)
        for n, of in _PAPER_TABLES.items()
    },
    "steering": About("texts that are steered by a map (Table 4)", "steering", _make_steering, mistakes=True),
}
"""What `reproduce` makes; Table 4 of the paper is `steering`."""


def find_targets(names: Sequence[str] | None) -> list[str]:
    """Find targets by their names, in the paper's order; all for None. OptionError for one that there is not."""
    known = {name.casefold(): name for name in TARGETS} | {"table4": "steering"}
    wanted = set()
    for given in names if names is not None else TARGETS:
        key = given.strip().casefold().replace(" ", "").replace("_", "").replace("figure", "fig")
        key = f"fig{key}" if key in ("2", "3", "4", "5", "6", "a1") else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            guess = f" (did you mean {' or '.join(known[one] for one in near)}?)" if near else ""
            raise OptionError(f"there is no target {given!r}{guess}: the targets are {', '.join(TARGETS)}")
        wanted.add(known[key])
    if not wanted:
        raise OptionError(f"name a target, or --all: {', '.join(TARGETS)}")
    return [name for name in TARGETS if name in wanted]
