"""What is said of watched words in a prompt's singular vectors."""

from __future__ import annotations

from rich.text import Text

from loclin.report.run import prompt, run_of
from loclin.report.sheet import PAGE, Block, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import number, percent, plain, shortened, signed, token, visible
from loclin.steering.watch import Watched

HITS = 20


@describe.register
def describe_watched(found: Watched, _limits: Limits = PAGE) -> Sheet:
    """Say which vectors write watched words, their part of each logit, and what removing them changes and costs."""
    run = run_of(found)
    assert run is not None
    point, words = run.options["target"], ", ".join(visible(word) for word in found.words)
    count = f"{len(found.hits)} of {found.searched} singular vectors to {point} write one of: {words}"
    sections = []
    if found.hits:
        more = [Text(f"  and {len(found.hits) - HITS} smaller ones", "dim")] if len(found.hits) > HITS else []
        sections.append(Section("", "", [_hits(found), *more, Text(), _shares(found, parts=point == "final"), Text()]))
    effects: list[Block] = []
    for name, effect in (("this prompt", found.here), ("neutral prompts", found.elsewhere)):
        if effect is not None:
            line = f"without them, at {name} ({effect.prompts}): log P(watched) {signed(effect.gain)} nats"
            effects.append(Text(f"{line}, KL of the next token {number(effect.kl)} nats"))
    for name, text in (("as it is", found.normal), ("without them", found.without)):
        if text is not None:
            effects.append(Text.assemble((f"{name}: ", "dim"), plain(text.text)))
    return Sheet(
        title=shortened(prompt(found)),
        about="singular vectors that write watched words",
        lead=[Text(count, "bold")],
        sections=[*sections, *([Section("", "", effects)] if effects else [])],
        notes=[run.gate] if found.hits else [],
        warnings=found.warnings,
        run=run,
    )


def _hits(found: Watched) -> Table:
    table = Table.of(Column("token", "key"), Column("σ"), Column("value"), Column("v·x"), Column("writes", "words"))
    for hit in found.hits[:HITS]:
        writes = Text(" ").join(token(word, "bold red" if word in hit.watched else "") for word in hit.writes)
        table.add(token(hit.text, "bold"), str(hit.rank), number(hit.value), signed(hit.gain), writes)
    return table


def _shares(found: Watched, parts: bool) -> Table:
    through = ["of it, through the hits", "share"] if parts else []
    names = ("probability", "logit", *through, "without them")
    table = Table.of(Column("next token", "key"), *map(Column, names))
    for share in found.shares:
        cells = [percent(share.probability), number(share.logit)]
        if parts:
            cells += [signed(share.part), f"{share.part / share.logit:+.0%}" if share.logit else ""]
        style = "bold red" if share.watched else "bold"
        table.add(token(share.text, style), *cells, percent(share.without))
    return table
