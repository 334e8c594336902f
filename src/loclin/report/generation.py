"""What a generation says: every step's prediction, what drove it, and how the tokens' maps moved."""

from __future__ import annotations

from statistics import median

from rich.text import Text

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.analyses.generation import Generation
from loclin.report.explanation import full_share, share_table
from loclin.report.run import prompt, run_of
from loclin.report.sheet import PAGE, Chip, Folded, Heat, Limits, Section, Shade, Sheet, describe, sheet_of
from loclin.report.table import COUNTER, Column, Table
from loclin.report.text import certified, error, number, percent, predicted, shortened, signed, token, words

_DRIVERS = 3
_COLUMN = 14
_DRIFT = {
    "change": "|J′ − J| / |J|, in the Frobenius norm: 0 where a token's map stayed what it was.",
    "cosine": "⟨J′, J⟩ / (|J′| |J|): 1 where only its size changed.",
    "writes": "Degrees between what the map wrote most strongly (its top left singular vectors), before and after.",
    "reads": "The same for what it reads (its top right singular vectors).",
}
"""What is told of a map that moved, and what it means."""


@describe.register
def _describe_generation(generation: Generation, limits: Limits = PAGE) -> Sheet:
    steps, first = generation.steps, generation.steps[0]
    title = shortened(prompt(first))
    moved = "change, cos: median over tokens of |J′ − J| / |J| and of ⟨J′, J⟩ / (|J′| |J|)"
    sections = [
        Section("", "", [_table(generation), Text(moved, "dim")]),
        Section(
            "Which tokens drive each word",
            f"A row for each generated word: the shares of its {first.target['kind']}. Full colour: the row's "
            "largest share of a word; outlined: more.",
            [_shares(generation)],
        ),
        Section(
            "How each token's map moved from one word to the next",
            "J is the map from the token to the position before the word that comes next.",
            [_drift(generation, *how) for how in _DRIFT.items()],
        ),
        Section("Every step", "", [_details(i, step, limits.tokens) for i, step in enumerate(steps)]),
    ]
    return sheet_of(
        first,
        "every generated word, explained by an exact linear map",
        sections if generation.drift else [*sections[:2], sections[3]],
        title=f"{title} … {len(steps)} words",
        heading=Text.assemble(title, token(generation.text, "green", limit=None)),
        chips=[Chip(part.text, marks=["sink"] * part.is_sink) for part in first.tokens],
        notes=[run_of(first).gate],
        warnings=generation.warnings,
    )


def _table(generation: Generation) -> Table:
    """Give a row to each step: what was predicted, whether the map is exact, what drove it, how the maps moved."""
    table = Table.of(
        *(COUNTER, Column("next", "key"), "", Column("map", "parts")),
        Column(f"largest shares of the {generation.steps[0].target['kind']}", "parts"),
        *(Column("writes (σ1 of the first of them)", "words"), "change", "cos"),
    )
    for i, step in enumerate(generation.steps):
        blocks = _largest_word(step).blocks
        drift = generation.drift[i - 1] if i else []
        table.add(
            str(i + 1),
            token(step.target["text"], "bold green"),
            Text(percent(step.target["probability"]), "green"),
            _exactness(step),
            [token(text).append(f" {signed(share)}", "dim") for text, share in _drivers(step)],
            words(blocks[0].writes, 4) if blocks else Text(),
            f"{median(part.change for part in drift):.2f}" if drift else "",
            f"{median(part.cosine for part in drift):.2f}" if drift else "",
        )
    return table


def _exactness(step: Explanation) -> Text:
    exact = ("exact ", "green") if step.certificate.passed else ("NOT EXACT ", "bold red")
    return Text.assemble(exact, (error(step.certificate.reconstruction_error), "dim"))


def _apart(step: Explanation) -> set[int]:
    """The positions that are named only where there is nothing else: of sinks, and those that are skipped."""
    return {*step.skipped, *(i for i, part in enumerate(step.tokens) if part.is_sink)}


def _largest_word(step: Explanation) -> TokenExplanation:
    chosen = [part for i, part in enumerate(step.tokens) if i not in _apart(step)] or step.tokens
    return max(chosen, key=lambda part: abs(part.share))


def _drivers(step: Explanation) -> list[tuple[str, float]]:
    """The words with the largest shares, or the groups, and the shares."""
    apart = _apart(step)
    if step.groups:
        grouped = zip(step.groups, step.group_shares, strict=True)
        named = [(group.name, share, set(group.positions) <= apart) for group, share in grouped]
    else:
        named = [(part.text, part.share, i in apart) for i, part in enumerate(step.tokens)]
    chosen = [(text, share) for text, share, is_apart in named if not is_apart] or [one[:2] for one in named]
    return sorted(chosen, key=lambda one: -abs(one[1]))[:_DRIVERS]


def _heat(generation: Generation, rows: list[tuple[Text, list[Shade], Text]], caption: Text | None = None) -> Heat:
    """A map with a column for each token that there ever was."""
    heads = [
        (token(part.text, marks=["sink"] * part.is_sink, limit=_COLUMN), 1) for part in generation.steps[-1].tokens
    ]
    return Heat(heads, rows, caption=caption)


def _shares(generation: Generation) -> Heat:
    rows = []
    for i, step in enumerate(generation.steps):
        full = full_share(step)
        cells = [Shade(part.share / full, text=f"{part.share:+.2f}") for part in step.tokens]
        after = predicted((step.target["text"], step.target["probability"])).append("  ").append_text(_exactness(step))
        rows.append((Text(str(i + 1)), cells, after))
    return _heat(generation, rows)


def _drift(generation: Generation, name: str, note: str) -> Heat:
    rows = []
    for i, drift in enumerate(generation.drift):
        values = [getattr(part, name) for part in drift]
        if name in ("change", "cosine"):
            cells = [Shade(1 - value if name == "cosine" else value, text=f"{value:.2f}") for value in values]
        else:
            cells = [Shade(value / 90, text=f"{value:.0f}°") for value in values]
        rows.append((Text(f"{i + 1} → {i + 2}"), cells, Text()))
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
