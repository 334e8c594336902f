"""What is said of a steered text, normal and steered side by side, and of watched words in singular vectors."""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text

from loclin.report.plot import NEUTRAL, PALETTE, curve, draw
from loclin.report.run import run_of
from loclin.report.sheet import PAGE, Block, Figure, Folded, Limits, Sayings, Section, Sheet, describe, sheet_of
from loclin.report.table import Cell, Column, Table
from loclin.report.text import number, percent, plain, shortened, signed, token, visible
from loclin.steering.methods import METHODS
from loclin.steering.search import Sweep
from loclin.steering.steer import Steered
from loclin.steering.watch import Watched
from loclin.steering.writing import Continuation

HITS = 20
"""How many vectors that write watched words are listed."""


@describe.register
def _describe_steered(found: Steered, _limits: Limits = PAGE) -> Sheet:
    texts = [("normal", _said(found, found.normal), "dim"), ("steered", _said(found, found.steered), "green")]
    listed = Text(f"words: {', '.join(map(visible, found.words))}", "dim")
    sections = [Section("", "", [Sayings(texts), _facts(found), _described(found), listed])]
    if found.sweep is not None:
        sections.append(_swept(found, found.sweep))
    about = f"a text, steered towards {', '.join(f'“{plain(text)}”' for text in found.toward)}"
    return sheet_of(found, about, sections, title=f"{shortened(found.prompt)} …", chips=[])


def _said(found: Steered, written: Continuation) -> Text:
    """The prompt, and what was written, with the concept's words marked."""
    said = Text(plain(written.text))
    if found.words:
        pattern = rf"\b(?:{'|'.join(map(re.escape, found.words))})\b"
        said.highlight_regex(re.compile(pattern, re.IGNORECASE), "bold green")
    end = " ■ end of text" if written.ended else " …"
    return Text.assemble((plain(found.prompt), "dim"), said, (end, "dim"))


def _facts(found: Steered) -> Table:
    """The two texts' numbers, in words."""
    normal, steered = found.normal, found.steered
    rows = (
        ("the concept's words, per hundred", f"{normal.frequency:.1f}", f"{steered.frequency:.1f}"),
        ("loss of the unsteered model, nats per token", f"{normal.loss:.2f}", f"{steered.loss:.2f}"),
        ("repeated three-token sequences", f"{normal.repetition:.0%}", f"{steered.repetition:.0%}"),
        ("next token: gain of the words, nats", "", f"{found.gain:+.2f}"),
        ("next token: KL from the unsteered one, nats", "", f"{found.kl:.2f}"),
    )
    return Table.of(Column("text", "key"), "normal", "steered", rows=rows)


def _described(found: Steered) -> Text:
    run = run_of(found)
    how = METHODS.get(found.method, found.method)  # type: ignore[call-overload]
    facts = [str(run.model["name"]), f"{found.method}: {how}", str(run.options["target"])]
    facts.append(f"strength {found.strength:g} ({found.form})")
    facts += [f"gate {run.options['gate']}"] if found.method in ("operator", "basis", "suffix") else []
    return Text(" · ".join(facts), "dim")


def _swept(found: Steered, sweep: Sweep) -> Section:
    chosen = (
        "Of the texts within the limit that say more of the words than the normal one and do not repeat themselves, "
        "the one that says most is taken, and of equal ones the one that gains most."
    )
    return Section(
        "How layer and strength were found",
        f"gain / KL, mean over this prompt and neutral ones; at most KL {sweep.max_kl:g}",
        [
            Figure("sweep", "Gain against KL for every layer and strength", lambda: _figure(sweep)),
            _grid(found, sweep),
            Text(chosen, "dim"),
            Folded(Text("All numbers"), [_trials(sweep)]),
        ],
    )


def _grid(found: Steered, sweep: Sweep) -> Table:
    """A row for each layer, a column for each strength."""
    strengths = sorted({trial.strength for trial in sweep.trials}, reverse=found.form == "interpolate")
    table = Table.of(Column("layer", "key"), *(f"{strength:g}" for strength in strengths))
    cells = {(trial.layer, trial.strength): trial for trial in sweep.trials}
    for layer in sorted({trial.layer for trial in sweep.trials}):
        row: list[Cell] = []
        for strength in strengths:
            trial = cells.get((layer, strength))
            style = "bold green" if trial == sweep.best else "" if trial and trial.kl <= sweep.max_kl else "dim"
            row.append(Text("not finite" if trial is None else f"{trial.gain:+.2f} / {trial.kl:.2f}", style))
        table.add(str(layer), *row)
    return table


def _trials(sweep: Sweep) -> Table:
    """Every setting's numbers; those of its text only where it wrote one."""
    table = Table.of(Column("layer", "key"), "strength", "gain", "KL", "words per hundred", "repeated")
    for trial in sweep.trials:
        text = trial.written
        said = [] if text is None else [f"{text.frequency:.1f}", f"{text.repetition:.0%}"]
        numbers = [f"{trial.strength:g}", f"{trial.gain:+.2f}", f"{trial.kl:.2f}", *said]
        table.add(str(trial.layer), *numbers, is_sum=trial == sweep.best)
    return table


def _figure(sweep: Sweep) -> dict[str, Any]:
    """Gain against KL: a line for each layer, a marker for each strength."""
    traces = []
    for n, layer in enumerate(sorted({trial.layer for trial in sweep.trials})):
        own = [trial for trial in sweep.trials if trial.layer == layer]
        traces.append(
            curve(
                [0.0, *(trial.kl for trial in own)],
                [0.0, *(trial.gain for trial in own)],
                f"layer {layer}",
                PALETTE[n % len(PALETTE)],
                text=["unsteered", *(f"layer {layer}, strength {trial.strength:g}" for trial in own)],
                hovertemplate="%{text}<br>gain %{y:.2f}, KL %{x:.2f}<extra></extra>",
            )
        )
    chosen = {"size": 16, "symbol": "circle-open", "color": NEUTRAL, "line": {"width": 3}}
    best = curve([sweep.best.kl], [sweep.best.gain], "chosen", NEUTRAL, mode="markers", hoverinfo="skip", marker=chosen)
    limit = {"type": "line", "x0": sweep.max_kl, "x1": sweep.max_kl, "y0": 0, "y1": 1, "yref": "paper"}
    return draw(
        [*traces, best],
        x="fluency lost: KL from the unsteered prediction, nats",
        y="gain of the words, nats",
        legend={},
        shapes=[limit | {"line": {"color": NEUTRAL, "dash": "dot", "width": 1}}],
    )


@describe.register
def _describe_watched(found: Watched, _limits: Limits = PAGE) -> Sheet:
    run = run_of(found)
    point, words = run.options["target"], ", ".join(map(visible, found.words))
    count = f"{len(found.hits)} of {found.searched} singular vectors to {point} write one of: {words}"
    effects: list[Block] = []
    for name, effect in (("this prompt", found.here), ("neutral prompts", found.elsewhere)):
        if effect is not None:
            line = f"without them, at {name} ({effect.prompts}): log P(watched) {signed(effect.gain)} nats"
            effects.append(Text(f"{line}, KL of the next token {number(effect.kl)} nats"))
    for name, text in (("as it is", found.normal), ("without them", found.without)):
        if text is not None:
            effects.append(Text.assemble((f"{name}: ", "dim"), plain(text.text)))
    hits: list[Block] = []
    if found.hits:
        more = [Text(f"  and {len(found.hits) - HITS} smaller ones", "dim")] if len(found.hits) > HITS else []
        hits = [_hits(found), *more, Text(), _watched_tokens(found, parts=point == "final"), Text()]
    return sheet_of(
        found,
        "singular vectors that write watched words",
        [Section("", "", blocks) for blocks in (hits, effects) if blocks],
        chips=[],
        lead=[Text(count, "bold")],
        notes=[run.gate] if found.hits else [],
    )


def _hits(found: Watched) -> Table:
    table = Table.of(Column("token", "key"), "σ", "value", "v·x", Column("writes", "words"))
    for hit in found.hits[:HITS]:
        writes = Text(" ").join(token(word, "bold red" if word in hit.watched else "") for word in hit.writes)
        table.add(token(hit.text, "bold"), str(hit.rank), number(hit.value), signed(hit.gain), writes)
    return table


def _watched_tokens(found: Watched, parts: bool) -> Table:
    through = ["of it, through the hits", "share"] if parts else []
    table = Table.of(Column("next token", "key"), "probability", "logit", *through, "without them")
    for share in found.shares:
        cells = [percent(share.probability), number(share.logit)]
        if parts:
            cells += [signed(share.part), f"{share.part / share.logit:+.0%}" if share.logit else ""]
        style = "bold red" if share.watched else "bold"
        table.add(token(share.text, style), *cells, percent(share.without))
    return table
