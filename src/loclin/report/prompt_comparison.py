"""What the comparison of two prompts says: which tokens change a target, by content or by the map."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.prompt_comparison import PromptComparison
from loclin.report.run import moved, prompt, run_of, wanted
from loclin.report.sheet import PAGE, Limits, Section, Sheet, describe, full_size, sheet_of
from loclin.report.table import BAR, Bar, Column, Table
from loclin.report.text import error, shortened, signed, token

_MOST = 80


@describe.register
def _describe_comparison(found: PromptComparison, limits: Limits = PAGE) -> Sheet:
    run, most = run_of(found), min(limits.tokens, _MOST)
    known = [i for i in range(len(found.pairs)) if i not in found.skipped]
    chosen = sorted(sorted(known, key=lambda i: -abs(found.pairs[i].change))[:most])
    full = full_size((found.pairs[i].change, False) for i in chosen)
    table = Table.of(Column("first", "key"), Column("second", "key"), "change", BAR, "content", "map", "share", "then")
    for pair in (found.pairs[i] for i in chosen):
        table.add(
            token(pair.first, "bold") if pair.at else Text("–", "dim"),
            token(pair.second, "bold") if pair.other else Text("–", "dim"),
            signed(pair.change),
            Bar(pair.change / full),
            "" if pair.content is None else signed(pair.content),
            "" if pair.map is None else signed(pair.map),
            Text(signed(pair.before) if pair.at else "", "dim"),
            Text(signed(pair.after) if pair.other else "", "dim"),
        )
    left = [pair.change for i, pair in enumerate(found.pairs) if i not in chosen]
    if left:
        table.add(Text(f"{len(left)} others", "italic"), "", signed(sum(left)), Bar(sum(left) / full))
    if any(found.biases):
        change = found.biases[1] - found.biases[0]
        table.add(Text("biases", "italic"), "", signed(change), Bar(change / full))
    closes = f"the changes sum to {signed(found.change - found.residual)}; rounding {error(abs(found.residual))}"
    notes = [
        "Content: other embeddings, with the mean of both maps. Map: the mean embedding, with another map.",
        *([run.gate] if run.facts else []),
    ]
    second = Text.assemble(("second: ", "dim"), shortened(found.second.text))
    if run.facts and found.second.model.name != (found.provenance and found.provenance.model.name):
        second.append(f" ({found.second.model.name})", "dim")
    return sheet_of(
        found,
        "one target in two prompts, as exact linear maps",
        [Section("Changes", "what each token's share changes by", [table, Text(closes, "bold")])],
        heading=Text.assemble(shortened(prompt(found)), (" → ", "dim"), wanted(found.target)),
        lead=[second, moved(found.target, found.value)],
        notes=notes,
    )
