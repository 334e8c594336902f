"""A generation on a terminal and as one small HTML file without scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.text import Text

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.analyses.generation import Drift, Generation
from loclin.report import html as parts
from loclin.report.choose import full_colour, largest
from loclin.report.explanation.tables import token_text, words_text
from loclin.report.grid import Cell, Column, Grid, show
from loclin.report.sheet import facts, section, sheet, shortened
from loclin.report.terminal import warning
from loclin.report.text import error, gate_note, number, percent, signed
from loclin.results.files import write_text

_DRIVERS = 3
_COLUMN = 14
_DRIFT = (
    ("change", "|J′ − J| / |J|, in the Frobenius norm: 0 where a token's map stayed what it was."),
    ("cosine", "⟨J′, J⟩ / (|J′| |J|): 1 where only its size changed."),
    ("writes", "Degrees between what the map wrote most strongly (its top left singular vectors), before and after."),
    ("reads", "The same for what it reads (its top right singular vectors)."),
)


def render_generation(generation: Generation, console: Console) -> None:
    """Print a row for each step: what was predicted, whether the map is exact, what drove it, how the maps moved."""
    first = generation.steps[0]
    table = Grid.of(
        Column("", "key"),
        Column("next", "key"),
        Column(""),
        Column("map", "parts"),
        Column(f"largest shares of the {first.target['kind']}", "parts"),
        Column("writes (σ1 of the first of them)", "words"),
        Column("change"),
        Column("cos"),
    )
    for i, step in enumerate(generation.steps):
        drift = generation.drift[i - 1] if i else []
        table.add(str(i + 1), *_row(step), *_medians(drift))
    show(
        console,
        Text(" ").join(token_text(t.text, "bold", t.is_sink) for t in first.tokens),
        table,
        Text("change, cos: median over tokens of |J′ − J| / |J| and of ⟨J′, J⟩ / (|J′| |J|)", "dim"),
        Text(gate_note(first.settings.get("gate")), "dim"),
        *(warning(text) for text in first.warnings),
    )


def _row(step: Explanation) -> list[Cell]:
    words = sorted(_drivers(step), key=lambda i: -abs(step.tokens[i].share))
    shares = [
        Text.assemble(token_text(step.tokens[i].text, ""), " ", (signed(step.tokens[i].share), "dim")) for i in words
    ]
    blocks = step.tokens[words[0]].blocks if words else []
    passed = step.certificate.passed
    verdict = Text("exact " if passed else "NOT EXACT ", "green" if passed else "bold red")
    return [
        token_text(step.target["text"], "bold green"),
        Text(percent(step.target["probability"]), "green"),
        verdict.append(error(step.certificate.reconstruction_error), "dim"),
        shares,
        words_text(blocks[0].writes[:4]) if blocks else Text(),
    ]


def _drivers(step: Explanation) -> list[int]:
    """The words with the largest shares; sinks only where there is nothing else."""
    words = [i for i, token in enumerate(step.tokens) if not token.is_sink] or list(range(len(step.tokens)))
    return [words[i] for i in largest([step.tokens[i] for i in words], _DRIVERS)]


def _medians(drift: Sequence[Drift]) -> list[str]:
    if not drift:
        return ["", ""]
    return [f"{median(token.change for token in drift):.2f}", f"{median(token.cosine for token in drift):.2f}"]


def generation_html(generation: Generation) -> str:
    """Write a generation as a self-contained HTML page."""
    steps, last = generation.steps, generation.steps[-1]
    shares = section(
        "Which tokens drive each word",
        f"A row for each generated word: the shares of its {steps[0].target['kind']}, J<sub>i</sub>x<sub>i</sub> "
        f"through the output head. Full colour: the row's largest share of a word. "
        f"{gate_note(steps[0].settings.get('gate'))}",
        _grid(last, [(str(i + 1), _share_cells(step), _next(step)) for i, step in enumerate(steps)]),
    )
    moved = "".join(
        f"<h3>{name} <small>{note}</small></h3>"
        + _grid(last, [(f"{i + 1} → {i + 2}", _drift_cells(step, name), "") for i, step in enumerate(generation.drift)])
        for name, note in _DRIFT
    )
    drift = section(
        "How each token's map moved from one word to the next",
        "J is the map from the token to the position before the word that comes next.",
        moved,
    )
    details = "".join(_details(i, step) for i, step in enumerate(steps))
    body = shares + (drift if generation.drift else "") + section("Every step", "", details)
    prompt, written = parts.token(steps[0].prompt), parts.token(generation.text)
    return sheet(
        title=f"{shortened(steps[0].prompt)} … {len(steps)} words",
        about="every generated word, explained by an exact linear map",
        heading=f'<span class="word">{prompt}</span><span class="word generated">{written}</span>',
        lead=parts.warnings(steps[0]),
        body=body,
        settings=facts(steps[0].model, {k: v for k, v in steps[0].settings.items() if k != "position"}),
    )


def write_generation(generation: Generation, path: str | os.PathLike[str]) -> None:
    """Write a generation's page to a file, whole or not at all."""
    write_text(path, generation_html(generation))


def _grid(last: Explanation, rows: Sequence[tuple[str, list[str], str]]) -> str:
    """A table with a column for each token that there ever was."""
    heads = "".join(_head(token) for token in last.tokens)
    lines = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(cells)}{"<td></td>" * (len(last.tokens) - len(cells))}'
        f'<td class="next">{after}</td></tr>'
        for name, cells, after in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region"><table class="grid-table"><thead><tr><th></th>{heads}</tr>'
        f"</thead><tbody>{lines}</tbody></table></div>"
    )


def _head(token: TokenExplanation) -> str:
    sink = " class=sink" if token.is_sink else ""
    return f'<th scope="col"{sink}><span class="word">{parts.token(token.text, _COLUMN)}</span></th>'


def _share_cells(step: Explanation) -> list[str]:
    full = full_colour(step.tokens)
    return [_cell(f"{token.share:+.2f}", token.share / full) for token in step.tokens]


def _drift_cells(drift: Sequence[Drift], name: str) -> list[str]:
    if name in ("writes", "reads"):
        return [_cell(f"{getattr(token, name):.0f}°", getattr(token, name) / 90) for token in drift]
    if name == "cosine":
        return [_cell(f"{token.cosine:.2f}", 1 - token.cosine) for token in drift]
    return [_cell(f"{token.change:.2f}", token.change) for token in drift]


def _cell(text: str, depth: float) -> str:
    """A number on a ground as deep as it is far from nothing."""
    side = " neg" if depth < 0 else ""
    return f'<td class="share{side}" style="--a:{0.78 * min(abs(depth), 1):.2f}">{text}</td>'


def _next(step: Explanation) -> str:
    kind = "exact" if step.certificate.passed else "inexact"
    said = "exact" if step.certificate.passed else "NOT EXACT"
    return (
        f'→ <b class="word">{parts.token(step.target["text"], 24)}</b> {percent(step.target["probability"])} '
        f'<small class="{kind}-dot">{said}, error {error(step.certificate.reconstruction_error)}</small>'
    )


def _details(index: int, step: Explanation) -> str:
    word = f'<span class="word">{parts.token(step.target["text"], 24)}</span>'
    name = f"{index + 1} {word} {step.target['kind']} {number(step.target['value'])}"
    others = "  ".join(
        f'<span class="word">{parts.token(text, 24)}</span> {percent(p)}' for text, p in step.predictions[1:5]
    )
    return (
        f"<details><summary>{name}</summary>{parts.verdict(step)}"
        f'<p class="note">runners-up: {others}</p><div class="scroll">{parts.token_table(step)}</div></details>'
    )
