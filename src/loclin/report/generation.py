"""What a generation says: every step's prediction, what drove it, and how the tokens' maps moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from rich.text import Text

from loclin.analyses.explain import Explanation
from loclin.analyses.generation import Drift, Generation
from loclin.report.explanation.sheet import full_share, largest, share_table
from loclin.report.run import prompt, run_of
from loclin.report.sheet import PAGE, Chip, Folded, Heat, Limits, Section, Shade, Sheet, describe
from loclin.report.table import Cell, Column, Table
from loclin.report.text import certified, error, number, percent, predicted, shortened, signed, token, words

_DRIVERS = 3
_COLUMN = 14
_DRIFT: tuple[tuple[str, str, Callable[[Drift], tuple[float, str]]], ...] = (
    (
        "change",
        "|J′ − J| / |J|, in the Frobenius norm: 0 where a token's map stayed what it was.",
        lambda drift: (drift.change, f"{drift.change:.2f}"),
    ),
    (
        "cosine",
        "⟨J′, J⟩ / (|J′| |J|): 1 where only its size changed.",
        lambda drift: (1 - drift.cosine, f"{drift.cosine:.2f}"),
    ),
    (
        "writes",
        "Degrees between what the map wrote most strongly (its top left singular vectors), before and after.",
        lambda drift: (drift.writes / 90, f"{drift.writes:.0f}°"),
    ),
    (
        "reads",
        "The same for what it reads (its top right singular vectors).",
        lambda drift: (drift.reads / 90, f"{drift.reads:.0f}°"),
    ),
)
"""What is told of a map that moved: its name, what it means, and how far from nothing it is."""


@describe.register
def describe_generation(generation: Generation, limits: Limits = PAGE) -> Sheet:
    """Say what a generation shows."""
    steps, first = generation.steps, generation.steps[0]
    title, run = shortened(prompt(first)), run_of(first)
    assert run is not None
    moved = "change, cos: median over tokens of |J′ − J| / |J| and of ⟨J′, J⟩ / (|J′| |J|)"
    return Sheet(
        title=f"{title} … {len(steps)} words",
        about="every generated word, explained by an exact linear map",
        heading=Text.assemble(title, token(generation.text, "green", limit=None)),
        chips=[Chip(part.text, marks=["sink"] * part.is_sink) for part in first.tokens],
        sections=[
            Section("", "", [_table(generation), Text(moved, "dim")]),
            Section(
                "Which tokens drive each word",
                f"A row for each generated word: the shares of its {first.target['kind']}. Full colour: the row's "
                "largest share of a word; outlined: more.",
                [_shares(generation)],
            ),
            *[_moves(generation)] * bool(generation.drift),
            Section("Every step", "", [_details(i, step, limits.tokens) for i, step in enumerate(steps)]),
        ],
        notes=[run.gate],
        warnings=generation.warnings,
        run=run,
    )


def _table(generation: Generation) -> Table:
    """Give a row to each step: what was predicted, whether the map is exact, what drove it, how the maps moved."""
    table = Table.of(
        Column("", "key"),
        Column("next", "key"),
        Column(""),
        Column("map", "parts"),
        Column(f"largest shares of the {generation.steps[0].target['kind']}", "parts"),
        Column("writes (σ1 of the first of them)", "words"),
        Column("change"),
        Column("cos"),
    )
    for i, step in enumerate(generation.steps):
        table.add(str(i + 1), *_row(step), *_medians(generation.drift[i - 1] if i else []))
    return table


def _row(step: Explanation) -> list[Cell]:
    drivers = sorted(_drivers(step), key=lambda i: -abs(step.tokens[i].share))
    shares = [token(step.tokens[i].text).append(f" {signed(step.tokens[i].share)}", "dim") for i in drivers]
    blocks = step.tokens[drivers[0]].blocks if drivers else []
    return [
        token(step.target["text"], "bold green"),
        Text(percent(step.target["probability"]), "green"),
        _exactness(step),
        shares,
        words(blocks[0].writes, 4) if blocks else Text(),
    ]


def _exactness(step: Explanation) -> Text:
    exact = ("exact ", "green") if step.certificate.passed else ("NOT EXACT ", "bold red")
    return Text.assemble(exact, (error(step.certificate.reconstruction_error), "dim"))


def _drivers(step: Explanation) -> list[int]:
    """The words with the largest shares; sinks only where there is nothing else."""
    chosen = [i for i, part in enumerate(step.tokens) if not part.is_sink] or list(range(len(step.tokens)))
    return [chosen[i] for i in largest([step.tokens[i] for i in chosen], _DRIVERS)]


def _medians(drift: Sequence[Drift]) -> list[str]:
    if not drift:
        return ["", ""]
    return [f"{median(part.change for part in drift):.2f}", f"{median(part.cosine for part in drift):.2f}"]


def _heat(generation: Generation, rows: list[tuple[Text, list[Shade], Text]], caption: Text | None = None) -> Heat:
    """A map with a column for each token that there ever was."""
    heads = [
        (token(part.text, marks=["sink"] * part.is_sink, limit=_COLUMN), 1) for part in generation.steps[-1].tokens
    ]
    return Heat(heads, rows, caption=caption)


def _shares(generation: Generation) -> Heat:
    rows = []
    for i, step in enumerate(generation.steps):
        full = full_share(step.tokens)
        cells = [Shade(part.share / full, text=f"{part.share:+.2f}") for part in step.tokens]
        after = predicted((step.target["text"], step.target["probability"])).append("  ").append_text(_exactness(step))
        rows.append((Text(str(i + 1)), cells, after))
    return _heat(generation, rows)


def _moves(generation: Generation) -> Section:
    return Section(
        "How each token's map moved from one word to the next",
        "J is the map from the token to the position before the word that comes next.",
        [_drift(generation, *how) for how in _DRIFT],
    )


def _drift(generation: Generation, name: str, note: str, read: Callable[[Drift], tuple[float, str]]) -> Heat:
    rows = [
        (Text(f"{i + 1} → {i + 2}"), [Shade(depth, text=said) for depth, said in map(read, drift)], Text())
        for i, drift in enumerate(generation.drift)
    ]
    return _heat(generation, rows, Text.assemble(name, (f" {note}", "small dim")))


def _details(index: int, step: Explanation, most: int) -> Folded:
    target = step.target
    return Folded(
        Text.assemble(f"{index + 1} ", token(target["text"]), f" {target['kind']} {number(target['value'])}"),
        [
            predicted((target["text"], target["probability"]), step.predictions[1:5]),
            certified(step.certificate, step.ordinary_error),
            *share_table(step, most),
        ],
    )
