"""An attribution on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from loclin.analyses.attribution.result import Attribution, Share
from loclin.report.explanation.tables import TABLE_TOKENS, bar, token_text, words_text
from loclin.report.grid import Cell, Column, Grid, show
from loclin.report.labels import LEVELS, by_layer, full_size, marks, others, quantity, reads, target_tokens, verdict
from loclin.report.terminal import PROMPT_HEAD, PROMPT_TAIL, Heading, settings, warning
from loclin.report.text import gate_note, number, percent, signed

_WORDS = 5


def render_attribution(found: Attribution, console: Console, top: int = 20, *, first: bool = True) -> None:
    """Print an attribution: the target, its shares, and that they sum to it.

    Parameters
    ----------
    found
        From `loclin.attribute`.
    console
        Where to print; colours follow it, and nothing depends on them.
    top
        How many of the largest shares to show; by token and layer up to 40 tokens and all layers are shown.
    first
        Begin with the prompt and the target: for the first of several attributions of one target.
    """
    parts: list[Any] = [_prompt(found), _target(found)] if first else []
    parts += [*(warning(text) for text in found.warnings)] if first or found.by in ("head", "neuron") else []
    title, note = LEVELS[found.by]
    table = {"token": _tokens, "layer": _layers}.get(found.by, _parts)(found, top)
    parts += [Text(), Heading(title, note), table, Text(verdict(found), "bold")]
    show(console, *parts)


def render_attribution_settings(found: Attribution, console: Console) -> None:
    """Print what was run, and how."""
    known = found.provenance
    if known is not None:
        console.print(Text(gate_note(known.gate), "dim"))
        facts = {"gate": known.gate, "precision": known.precision, "position": found.target["position"]}
        show(console, settings(known.model.to_dict(), facts, known.versions))


def _prompt(found: Attribution) -> Text:
    shown = [token_text(text, "bold", i in found.sinks) for i, text in enumerate(found.texts)]
    hidden = len(shown) - PROMPT_HEAD - PROMPT_TAIL
    if hidden > 0:
        shown[PROMPT_HEAD:-PROMPT_TAIL] = [Text(f"… {hidden} more tokens …", "dim italic")]
    return Text(" ").join(shown)


def _target(found: Attribution) -> Text:
    line = Text(f"{quantity(found)} ", "green")
    for i, piece in enumerate(target_tokens(found)):
        line.append_text(Text(piece) if i % 2 else token_text(piece, "bold green"))
    line.append(f" {number(found.value)}", "bold")
    probability = found.target.get("probability")
    return line if probability is None else line.append(f"   probability {percent(probability)}", "dim")


def _rest(table: Grid, rest: list[tuple[str, float]], full: float, *before: str) -> None:
    for name, share in rest:
        table.add(*before, Text(name, "italic"), signed(share), bar(share, full))


def _tokens(found: Attribution, _top: int) -> Grid:
    chosen = sorted(found.top(TABLE_TOKENS, "token"), key=lambda part: part.token or 0)
    full = full_size(found, chosen)
    table = Grid.of(Column("", "key"), Column("token", "key"), Column("share"), Column("", "bar"))
    for part in chosen:
        name = token_text(part.name, "bold")
        for mark in marks(found, part.token or 0):
            name.append(f"◂{mark}", "yellow not bold")
        table.add(Text(str(part.token), "dim"), name, signed(part.share), bar(part.share, full))
    _rest(table, others(found, chosen), full, "")
    return table


def _layers(found: Attribution, _top: int) -> Grid:
    """A row for each layer: its attention, its MLP, and what the larger of them writes."""
    table = Grid.of(
        Column("layer", "key"),
        Column("attention"),
        Column("", "bar"),
        Column("MLP"),
        Column("", "bar"),
        Column("through"),
        Column("writes", "words"),
    )
    full = full_size(found, found.parts)
    for layer, here in by_layer(found).items():
        cells: list[Cell] = [Text(str(layer), "dim")]
        for kind in ("attn_out", "mlp_out"):
            cells += [signed(here[kind].share), bar(here[kind].share, full)] if kind in here else ["", ""]
        through = " ".join(signed(part.through or 0.0) for part in here.values())
        writes = max(here.values(), key=lambda part: abs(part.share)).writes or []
        table.add(*cells, Text(through, "dim"), words_text(writes[:_WORDS]))
    for name, share in others(found, [part for part in found.parts if part.layer is not None]):
        table.add(Text(name, "italic"), signed(share), bar(share, full))
    return table


def _parts(found: Attribution, top: int) -> Grid:
    """The largest shares, whatever they are of."""
    chosen = found.top(top, found.unit)
    full = full_size(found, chosen)
    more = {"token×layer": ["token"], "head": ["reads", "writes"], "neuron": ["writes"]}.get(found.by, [])
    through = [Column("through")] if found.through is not None else []
    names = [Column(name, "key" if name == "token" else "words") for name in more]
    table = Grid.of(Column("part", "key"), Column("share"), Column("", "bar"), *through, *names)
    for part in chosen:
        cells: list[Cell] = [Text(part.name, "bold"), signed(part.share), bar(part.share, full)]
        cells += [] if part.through is None else [Text(signed(part.through), "dim")]
        for column in more:
            cells.append(
                words_text((part.writes or [])[:_WORDS])
                if column == "writes"
                else _reads(found, part)
                if column == "reads"
                else Text("biases", "italic")
                if part.token is None
                else token_text(found.texts[part.token], "")
            )
        table.add(*cells)
    _rest(table, others(found, chosen), full)
    return table


def _reads(found: Attribution, part: Share) -> list[Text]:
    """The tokens that a head reads most at, each with its part of the share."""
    return [token_text(text, "").append(f" {signed(share)}", "dim") for text, share in reads(found, part)]
