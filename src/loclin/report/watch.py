"""Watched words in a prompt's singular vectors, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loclin.analyses.watch import Watched
from loclin.report.terminal import warning
from loclin.report.terminal_tables import token_text
from loclin.report.terms import gate_note
from loclin.report.text import number, percent, signed, visible

HITS = 20


def render_watched(found: Watched, console: Console) -> None:
    """Print the hits, their part of each logit, and what removing them changes and costs."""
    point, words = found.settings["point"], ", ".join(visible(word) for word in found.words)
    count = f"{len(found.hits)} of {found.searched} singular vectors to {point} write one of: {words}"
    console.print(Text(count, "bold"))
    for text in found.warnings:
        console.print(warning(text))
    if not found.hits:
        return
    console.print(_hits(found))
    if len(found.hits) > HITS:
        console.print(Text(f"  and {len(found.hits) - HITS} smaller ones", "dim"))
    console.print()
    console.print(_shares(found, parts=point == "final"))
    console.print()
    for name, effect in (("this prompt", found.here), ("neutral prompts", found.elsewhere)):
        if effect is not None:
            line = f"without them, at {name} ({effect.prompts}): log P(watched) {signed(effect.gain)} nats"
            console.print(Text(f"{line}, KL of the next token {number(effect.kl)} nats"))
    for name, written in (("as it is", found.normal), ("without them", found.without)):
        if written is not None:
            console.print(Text.assemble((f"{name}: ", "dim"), visible(written.text).replace("·", " ")))
    console.print(Text(gate_note(found.settings.get("gate")), "dim"))


def _hits(found: Watched) -> Table:
    table = Table("token", "σ", "value", "v·x", "writes", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for hit in found.hits[:HITS]:
        words = Text(" ")
        for word in hit.writes:
            words.append_text(token_text(word, "bold red" if word in hit.watched else "")).append(" ")
        table.add_row(
            token_text(hit.text, "bold"), str(hit.rank), number(hit.value), signed(hit.gain), words
        )  # fmt: skip
    return table


def _shares(found: Watched, parts: bool) -> Table:
    table = Table("next token", "probability", "logit", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (*(["of it, through the hits", "share"] if parts else []), "without them"):
        table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"
    for share in found.shares:
        cells = [percent(share.probability), number(share.logit)]
        if parts:
            cells += [signed(share.part), f"{share.part / share.logit:+.0%}" if share.logit else ""]
        style = "bold red" if share.watched else "bold"
        table.add_row(token_text(share.text, style), *cells, percent(share.without))
    return table
