"""What an explanation says: shares of all tokens, and what each token's map writes and reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from rich.text import Text

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.report.run import prompt, run_of
from loclin.report.sheet import KEY, PAGE, Block, Chip, Limits, Section, Sheet, describe, full_size, sheet_of
from loclin.report.table import BAR, COUNTER, Bar, Cell, Column, Table
from loclin.report.text import certified, error, number, predicted, shortened, sigmas, signed, token, visible, words
from loclin.report.units import full_group, group_table

DETAIL_TOKENS = 12
RUNNERS_UP = 4
_READS, _WRITES = Text("reads", "dim"), Text("writes", "dim")
_ZERO = Text("the map is zero", "dim italic")


def largest(found: Explanation, most: int) -> list[int]:
    """Find the positions of the `most` tokens with the largest |share|, in the prompt's order, without skipped ones."""
    known = [i for i in range(len(found.tokens)) if i not in found.skipped]
    return sorted(sorted(known, key=lambda i: -abs(found.tokens[i].share))[:most])


def full_share(found: Explanation) -> float:
    """Find the |share| of a token to draw in full."""
    return full_size((part.share, part.is_sink or i in found.skipped) for i, part in enumerate(found.tokens))


def summary(index: int, part: TokenExplanation) -> str:
    """Put a token's numbers into a line."""
    return (
        f"token {index} {visible(part.text)}{', attention sink' * part.is_sink}: share {signed(part.share)}, "
        f"Frobenius norm {number(part.frobenius_norm)}, stable rank {number(part.stable_rank)}"
    )


@describe.register
def describe_explanation(found: Explanation, limits: Limits = PAGE) -> Sheet:
    """Say what an explanation shows."""
    target, full, run = found.target, full_share(found), run_of(found)
    chosen = (target["text"], target["probability"])
    others = [word for word in found.predictions if word[0] != chosen[0]][:RUNNERS_UP]
    blocks, units = _details(found, partial(_blocks, most=limits.vectors)), _details(found, _units)
    shown = f"the {DETAIL_TOKENS} of {len(found.tokens)} tokens with the largest |share|"
    collapsed = [Text(shown, "dim italic")] if len(found.tokens) > DETAIL_TOKENS else []
    shares = [*share_table(found, limits.tokens), Text(run.gate, "dim")]
    return sheet_of(
        found,
        "the model, at this prompt, as an exact linear map",
        [
            Section("Which tokens drive it", f"shares of the {target['kind']}: J_i x_i through the head", shares),
            Section("What each token's map writes and reads", "its singular vectors", [*collapsed, blocks]),
            Section("Rows and columns of largest norm", "the largest of each", [*collapsed, units]),
        ],
        heading=Text.assemble(shortened(prompt(found)), (" → ", "dim"), token(target["text"])),
        chips=[
            Chip(part.text, part.share / full, summary(i, part), ["sink"] * part.is_sink)
            for i, part in enumerate(found.tokens)
        ],
        key=KEY,
        lead=[predicted(chosen, others), certified(found.certificate, found.ordinary_error)],
        run=replace(run, more=(f"{run.options['source']} → {run.options['target']}",)),
    )


def share_table(found: Explanation, most: int) -> list[Block]:
    """Give a row to each token, one to the biases, and the total; the largest word's bar is full."""
    tokens = found.tokens
    shown, full = largest(found, most), full_share(found)
    table = Table.of(
        *(COUNTER, Column("token", "key"), "share", BAR, "‖J‖F", "stable rank"),
        *(Column("writes (σ1)", "words"), Column("reads (σ1)", "words")),
    )
    for i in shown:
        part = tokens[i]
        sides = [words(part.blocks[0].writes), words(part.blocks[0].reads)] if part.blocks else [_ZERO]
        sizes = [f"{part.frobenius_norm:.3g}", f"{part.stable_rank:.2f}"]
        table.add(str(i), _name(part), signed(part.share), Bar(part.share / full), *sizes, *sides, token=i)
    left_out, total = [], sum(part.share for part in tokens)
    if len(shown) < len(tokens):
        rest = total - sum(tokens[i].share for i in shown)
        table.add("", Text(f"{len(tokens) - len(shown)} others", "italic"), signed(rest))
        left_out = [Text(f"above: the {len(shown)} largest", "dim italic")]
    bias = found.bias_share
    table.add("", Text("bias", "italic"), signed(bias), Bar(bias / full))
    table.add("", Text("total", "bold"), Text(signed(total + bias), "bold"), is_sum=True)
    value = f"the total is the {found.target['kind']}, {number(found.target['value'])}"
    sums = Text.assemble((value, "bold"), (f"   rounding {error(abs(found.share_residual))}", "dim"))
    return [*_groups(found, most), table, sums, *left_out]


def _groups(found: Explanation, most: int) -> list[Block]:
    """A table of the groups that were asked for."""
    apart = {*found.skipped, *(i for i, part in enumerate(found.tokens) if part.is_sink)}
    full = full_group(found.groups, found.group_shares, apart)
    table, _ = group_table("group", found.groups, found.group_shares, full, found.skipped, most)
    return [table] if found.groups else []


def _name(part: TokenExplanation) -> Text:
    return token(part.text, "bold", ["sink"] * part.is_sink)


def _details(found: Explanation, rows_of: Callable[[TokenExplanation], Iterator[Sequence[Cell]]]) -> Table:
    """Rows for each token, of a long prompt for those that matter: a number, which way its words go, and the words."""
    table = Table.of(COUNTER, COUNTER, "", Column("", "parts"), Column("", "words"))
    for i in largest(found, DETAIL_TOKENS):
        first, *others = list(rows_of(found.tokens[i])) or [("", "", _ZERO)]
        table.add(str(i), _name(found.tokens[i]), *first)
        for row in others:
            table.add("", "", *row)
    return table


def _blocks(part: TokenExplanation, most: int) -> Iterator[Sequence[Cell]]:
    for block in part.blocks[:most]:
        first, last = number(block.values[0]), number(block.values[-1])
        values = first if first == last else f"{first}…{last}"
        gain = f"v·x {signed(block.gain)}" if block.gain is not None else "near-equal"
        yield f"{sigmas(block.indices)} {values}", _WRITES, words(block.writes)
        yield Text(gain, "dim"), _READS, words(block.reads)


def _units(part: TokenExplanation) -> Iterator[Sequence[Cell]]:
    """The largest row and column of a token's map (paper, Figure 4A)."""
    for row, column in zip(part.rows[:1], part.columns[:1], strict=True):
        yield f"row {row.index} {number(row.norm)}", _READS, words(row.words)
        yield f"column {column.index} {number(column.norm)}", _WRITES, words(column.words)
