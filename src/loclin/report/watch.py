"""Watched words in a prompt's singular vectors, on a terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.text import Text

from loclin.report.explanation.tables import token_text
from loclin.report.grid import Column, Grid, show
from loclin.report.terminal import warning
from loclin.report.text import gate_note, number, percent, signed, visible
from loclin.steering.watch import Watched

HITS = 20


def render_watched(found: Watched, console: Console) -> None:
    """Print the hits, their part of each logit, and what removing them changes and costs."""
    point, words = found.settings["point"], ", ".join(visible(word) for word in found.words)
    count = f"{len(found.hits)} of {found.searched} singular vectors to {point} write one of: {words}"
    parts: list[RenderableType] = [Text(count, "bold"), *(warning(text) for text in found.warnings)]
    if found.hits:
        parts.append(_hits(found))
        if len(found.hits) > HITS:
            parts.append(Text(f"  and {len(found.hits) - HITS} smaller ones", "dim"))
        parts += [Text(), _shares(found, parts=point == "final"), Text()]
    for name, effect in (("this prompt", found.here), ("neutral prompts", found.elsewhere)):
        if effect is not None:
            line = f"without them, at {name} ({effect.prompts}): log P(watched) {signed(effect.gain)} nats"
            parts.append(Text(f"{line}, KL of the next token {number(effect.kl)} nats"))
    for name, text in (("as it is", found.normal), ("without them", found.without)):
        if text is not None:
            parts.append(Text.assemble((f"{name}: ", "dim"), visible(text.text).replace("·", " ")))
    if found.hits:
        parts.append(Text(gate_note(found.settings.get("gate")), "dim"))
    show(console, *parts)


def _hits(found: Watched) -> Grid:
    table = Grid.of(Column("token", "key"), Column("σ"), Column("value"), Column("v·x"), Column("writes", "words"))
    for hit in found.hits[:HITS]:
        words = Text(" ")
        for word in hit.writes:
            words.append_text(token_text(word, "bold red" if word in hit.watched else "")).append(" ")
        table.add(token_text(hit.text, "bold"), str(hit.rank), number(hit.value), signed(hit.gain), words)
    return table


def _shares(found: Watched, parts: bool) -> Grid:
    through = ["of it, through the hits", "share"] if parts else []
    names = ("probability", "logit", *through, "without them")
    table = Grid.of(Column("next token", "key"), *map(Column, names))
    for share in found.shares:
        cells = [percent(share.probability), number(share.logit)]
        if parts:
            cells += [signed(share.part), f"{share.part / share.logit:+.0%}" if share.logit else ""]
        style = "bold red" if share.watched else "bold"
        table.add(token_text(share.text, style), *cells, percent(share.without))
    return table
