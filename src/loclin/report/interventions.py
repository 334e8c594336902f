"""What interventions say: the change of a target by each component, frozen and real."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.intervene import Interventions
from loclin.report.run import prompt, run_of, tokens, wanted
from loclin.report.sheet import PAGE, Limits, Section, Sheet, describe, full_size, sheet_of
from loclin.report.table import BAR, Bar, Column, Table
from loclin.report.text import number, percent, shortened, signed, token

_BY = {"zero": "zero", "mean": "its mean over the prompt", "patch": "its value in the other prompt"}


@describe.register
def _describe_interventions(found: Interventions, _limits: Limits = PAGE) -> Sheet:
    run, full = run_of(found), full_size((max(e.frozen, e.model, key=abs), False) for e in found.effects)
    table = Table.of(
        Column("component", "key"), "frozen says", BAR, "model says", BAR, Column("then predicts", "key"), ""
    )
    for effect in found.effects:
        table.add(
            _name(found, effect.name),
            signed(effect.frozen),
            Bar(effect.frozen / full),
            signed(effect.model),
            Bar(effect.model / full),
            token(effect.predicted),
            percent(effect.probability),
        )
    goal = wanted(found.target)
    text, probability = found.predicted
    where = f" at positions {', '.join(map(str, found.positions))}" if found.positions else ""
    lead = Text.assemble((f"{found.target['kind']} ", "green"), goal, (f" {number(found.target['value'])}", "bold"))
    lead.append("   predicted ", "dim").append_text(token(text)).append(f" {percent(probability)}", "dim")
    note = f"the change of the {found.target['kind']} when each alone is replaced by {_BY[found.how]}{where}"
    return sheet_of(
        found,
        "components replaced, one at a time",
        [Section("Interventions", note, [table])],
        heading=Text.assemble(shortened(prompt(found)), (" → ", "dim"), goal),
        lead=[lead],
        notes=[
            "Frozen: exact with attention, norms and gates held. Model: a run in which they answer to the change.",
            *([run.gate] if run.facts else []),
        ],
    )


def _name(found: Interventions, name: str) -> Text:
    """A component's name; a token's with its text behind it."""
    shown = Text(name, "bold")
    texts = tokens(found)
    if name[:1] == "T" and name[1:].isdecimal() and int(name[1:]) < len(texts):
        shown.append(" ").append_text(token(texts[int(name[1:])]))
    return shown
