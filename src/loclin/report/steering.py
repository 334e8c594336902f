"""What is said of a steered text: normal and steered side by side, what it costs, and the sweep for the strength."""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text

from loclin.report.plot import NEUTRAL, PALETTE, curve, draw
from loclin.report.run import Run, run_of
from loclin.report.sheet import PAGE, Figure, Folded, Limits, Sayings, Section, Sheet, describe
from loclin.report.table import Cell, Column, Table
from loclin.report.text import plain, shortened, visible
from loclin.steering.methods import METHODS
from loclin.steering.search import Sweep
from loclin.steering.steer import Steered
from loclin.steering.writing import Continuation


@describe.register
def describe_steered(found: Steered, _limits: Limits = PAGE) -> Sheet:
    """Say how a text was steered, and what it costs."""
    run = run_of(found)
    assert run is not None
    sayings = Sayings(
        [("normal", _said(found, found.normal), "dim"), ("steered", _said(found, found.steered), "green")]
    )
    listed = Text(f"words: {', '.join(map(visible, found.words))}", "dim")
    sections = [Section("", "", [sayings, _facts(found), _described(found, run), listed])]
    if found.sweep is not None:
        sections.append(_swept(found, found.sweep))
    return Sheet(
        title=f"{shortened(found.prompt)} …",
        about=f"a text, steered towards {', '.join(f'“{plain(text)}”' for text in found.toward)}",
        sections=sections,
        warnings=found.warnings,
        run=run,
    )


def _said(found: Steered, written: Continuation) -> Text:
    """The prompt, and what was written, with the concept's words marked."""
    said = Text(plain(written.text))
    if found.words:
        pattern = rf"\b(?:{'|'.join(map(re.escape, found.words))})\b"
        said.highlight_regex(re.compile(pattern, re.IGNORECASE), "bold green")
    end = " ⏹ end of text" if written.ended else " …"
    return Text.assemble((plain(found.prompt), "dim"), said, (end, "dim"))


def _facts(found: Steered) -> Table:
    """The two texts' numbers, in words."""
    normal, steered = found.normal, found.steered
    table = Table.of(Column("text", "key"), Column("normal"), Column("steered"))
    for row in (
        ("the concept's words, per hundred", f"{normal.frequency:.1f}", f"{steered.frequency:.1f}"),
        ("loss of the unsteered model, nats per token", f"{normal.loss:.2f}", f"{steered.loss:.2f}"),
        ("repeated three-token sequences", f"{normal.repetition:.0%}", f"{steered.repetition:.0%}"),
        ("next token: gain of the words, nats", "", f"{found.gain:+.2f}"),
        ("next token: KL from the unsteered one, nats", "", f"{found.kl:.2f}"),
    ):
        table.add(*row)
    return table


def _described(found: Steered, run: Run) -> Text:
    how = METHODS.get(found.method, found.method)  # type: ignore[call-overload]
    facts = [str(run.model["name"]), f"{found.method}: {how}", str(run.options["target"])]
    facts.append(f"strength {found.strength:g} ({found.form})")
    facts += [f"gate {run.options['gate']}"] if found.method in ("operator", "basis", "suffix") else []
    return Text(" · ".join(facts), "dim")


def _swept(found: Steered, sweep: Sweep) -> Section:
    """How layer and strength were found."""
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
    table = Table.of(Column("layer", "key"), *(Column(f"{strength:g}") for strength in strengths))
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
    heads = ("strength", "gain", "KL", "words per hundred", "repeated")
    table = Table.of(Column("layer", "key"), *map(Column, heads))
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
