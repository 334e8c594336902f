"""What activation patching says: which activations of a second prompt change a target, and where."""

from __future__ import annotations

from dataclasses import replace

from rich.text import Text

from loclin.analyses.patching import Patching, place
from loclin.report.attribution import head_heat, heat
from loclin.report.run import moved, prompt, run_of, wanted
from loclin.report.sheet import PAGE, Block, Limits, Section, Sheet, describe, full_size, sheet_of
from loclin.report.table import BAR, Bar, Cell, Column, Table
from loclin.report.text import percent, shortened, signed, token, visible

_MOST = 80
"""Columns of a map of tokens."""
_KINDS = {
    "resid_pre": ("Residual stream", "before each layer, replaced by that of the second prompt"),
    "attn_out": ("Attentions", "what each adds, replaced by what it adds in the second prompt"),
    "mlp_out": ("MLPs", "what each adds, replaced by what it adds in the second prompt"),
    "resid_post": ("Behind the last layer", "the residual stream there"),
    "head": ("Heads", "what each query head gives, replaced by what it gives in the second prompt"),
}


@describe.register
def _describe_patching(found: Patching, limits: Limits = PAGE) -> Sheet:
    run = run_of(found)
    most = max(3, limits.parts // len(found.kinds))
    lead = moved(found.target, found.value)
    if found.predicted is not None:
        text, probability = found.predicted
        lead.append("   predicted ", "dim").append_text(token(text)).append(f" {percent(probability)}", "dim")
    notes = [
        "Frozen: exact with attention, norms and gates held. What a point changes goes through all later ones too, so "
        "that changes overlap.",
        *(["Model: a run in which attention, norms and gates answer to the change."] if found.checked else []),
        *([run.gate] if run.facts else []),
    ]
    return sheet_of(
        found,
        "activations of a second prompt, each alone in the first, as exact linear maps",
        [Section(*_KINDS[kind], [_map(found, kind), _table(found, kind, most)]) for kind in found.kinds],
        heading=Text.assemble(shortened(prompt(found)), (" → ", "dim"), wanted(found.target)),
        lead=[Text.assemble(("second: ", "dim"), shortened(found.second.text)), lead],
        notes=notes,
    )


def _map(found: Patching, kind: str) -> Block:
    """A map of layers by tokens; of heads, their sums over all tokens as a map of layers by heads."""
    matrix, names = found.matrix(kind)
    if kind == "head":
        sums = dict(zip(names, matrix.sum(1).tolist(), strict=True))
        return head_heat(sums, full_size((share, False) for share in sums.values()), "head, over all tokens")
    shown = sorted(matrix.abs().amax(0).argsort(descending=True)[:_MOST].tolist())
    heads = [_pair(found, i) for i in shown]
    rows = [
        (name, [(f"{place(name, i)} {text.plain}", row[i].item()) for i, text in zip(shown, heads, strict=True)])
        for name, row in zip(reversed(names), matrix.flip(0), strict=True)
    ]
    full = full_size((size, False) for size in matrix.abs().flatten().tolist())
    made = heat(rows, [(text, 1) for text in heads], full, "token")
    hidden = matrix.shape[1] - len(shown)
    return replace(made, note=f"{made.note} {hidden} tokens of smaller changes are left out.") if hidden else made


def _pair(found: Patching, i: int) -> Text:
    """A token of the first prompt, and of the second where it is another."""
    first, second = (visible(known.tokens[i], 12) for known in (found.provenance, found.second))
    return Text(first if first == second else f"{first} → {second}")


def _table(found: Patching, kind: str, most: int) -> Table:
    runs = {effect.name: effect for effect in found.checked}
    largest = [one for one in found.top(most, kind) if one[2]] or found.top(1, kind)
    checked = any(place(point, i) in runs for point, i, _ in largest)
    full = full_size(
        (max(change, runs[name].model if (name := place(point, i)) in runs else 0.0, key=abs), False)
        for point, i, change in largest
    )
    runs_too = [Column("model says"), BAR, Column("then predicts", "key"), Column("")] if checked else []
    table = Table.of(Column("point", "key"), Column("token", "key"), "frozen says", BAR, *runs_too)
    for point, i, change in largest:
        cells: list[Cell] = [Text(point, "bold"), Text.assemble((f"{i} ", "dim"), _pair(found, i))]
        cells += [signed(change), Bar(change / full)]
        if (run := runs.get(place(point, i))) is not None:
            cells += [signed(run.model), Bar(run.model / full), token(run.predicted), percent(run.probability)]
        table.add(*cells)
    return table
