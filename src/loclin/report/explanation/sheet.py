"""What an explanation says: shares of all tokens, and what each token's map writes and reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.text import Text

from loclin.analyses.decode import SingularBlock
from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.report.run import prompt, run_of
from loclin.report.sheet import KEY, PAGE, Block, Chip, Limits, Section, Sheet, describe, full_size
from loclin.report.table import Bar, Column, Table
from loclin.report.text import (
    certified,
    error,
    number,
    predicted,
    shortened,
    sigmas,
    signed,
    token,
    visible,
    words,
)

DETAIL_TOKENS = 12
RUNNERS_UP = 4
_READS, _WRITES = Text("reads", "dim"), Text("writes", "dim")
_ZERO = Text("the map is zero", "dim italic")


def largest(tokens: Sequence[TokenExplanation], most: int) -> list[int]:
    """Find the positions of the `most` tokens with the largest |share|, in the prompt's order."""
    ranked = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].share))
    return sorted(ranked[:most])


def full_share(tokens: Sequence[TokenExplanation]) -> float:
    """Find the |share| of a token to draw in full."""
    return full_size((token.share, token.is_sink) for token in tokens)


def summary(index: int, part: TokenExplanation) -> str:
    """Put a token's numbers into a line."""
    return (
        f"token {index} {visible(part.text)}{', attention sink' * part.is_sink}: share {signed(part.share)}, "
        f"Frobenius norm {number(part.frobenius_norm)}, stable rank {number(part.stable_rank)}"
    )


@describe.register
def describe_explanation(explanation: Explanation, limits: Limits = PAGE) -> Sheet:
    """Say what an explanation shows."""
    target, full = explanation.target, full_share(explanation.tokens)
    title = shortened(prompt(explanation))
    chosen = (target["text"], target["probability"])
    others = [word for word in explanation.predictions if word != chosen]
    run = run_of(explanation)
    assert run is not None
    return Sheet(
        title=title,
        about="the model, at this prompt, as an exact linear map",
        heading=Text.assemble(title, (" → ", "dim"), token(target["text"])),
        chips=[
            Chip(part.text, part.share / full, summary(i, part), ["sink"] * part.is_sink)
            for i, part in enumerate(explanation.tokens)
        ],
        key=KEY,
        lead=[
            predicted(chosen, others[:RUNNERS_UP]),
            certified(explanation.certificate, explanation.ordinary_error),
        ],
        sections=[
            Section(
                "Which tokens drive it",
                f"shares of the {target['kind']}: J_i x_i through the head",
                [*share_table(explanation, limits.tokens), Text(run.gate, "dim")],
            ),
            Section(
                "What each token's map writes and reads",
                "its singular vectors",
                [*_collapsed(explanation.tokens), _block_table(explanation, limits.vectors)],
            ),
            Section(
                "Rows and columns of largest norm",
                "the largest of each",
                [*_collapsed(explanation.tokens), _unit_table(explanation)],
            ),
        ],
        warnings=explanation.warnings,
        run=replace(run, more=(run.ends,)),
    )


def share_table(explanation: Explanation, most: int) -> list[Block]:
    """Give a row to each token, one to the biases, and the total; the largest word's bar is full."""
    tokens = explanation.tokens
    shown, full = largest(tokens, most), full_share(tokens)
    table = Table.of(
        Column("", "key"),
        Column("token", "key"),
        Column("share"),
        Column("", "bar"),
        Column("‖J‖F"),
        Column("stable rank"),
        Column("writes (σ1)", "words"),
        Column("reads (σ1)", "words"),
    )
    for i in shown:
        part = tokens[i]
        sides = [words(part.blocks[0].writes), words(part.blocks[0].reads)] if part.blocks else [_ZERO]
        sizes = [f"{part.frobenius_norm:.3g}", f"{part.stable_rank:.2f}"]
        table.add(str(i), _name(part), signed(part.share), Bar(part.share / full), *sizes, *sides, token=i)
    if len(shown) < len(tokens):
        rest = sum(part.share for part in tokens) - sum(tokens[i].share for i in shown)
        table.add("", Text(f"{len(tokens) - len(shown)} others", "italic"), signed(rest))
    bias = explanation.bias_share
    table.add("", Text("bias", "italic"), signed(bias), Bar(bias / full))
    total = sum(part.share for part in tokens) + bias
    table.add("", Text("total", "bold"), Text(signed(total), "bold"), is_sum=True)
    value = f"the total is the {explanation.target['kind']}, {number(explanation.target['value'])}"
    sums = Text.assemble((value, "bold"), (f"   rounding {error(abs(explanation.share_residual))}", "dim"))
    left_out = [Text(f"above: the {len(shown)} largest", "dim italic")] if len(shown) < len(tokens) else []
    return [table, sums, *left_out]


def _name(part: TokenExplanation) -> Text:
    return token(part.text, "bold", ["sink"] * part.is_sink)


def _block_table(explanation: Explanation, top: int) -> Table:
    """Put the `top` singular blocks of each token into words; of a long prompt, the tokens that matter."""
    table = _detail_table()
    for i in largest(explanation.tokens, DETAIL_TOKENS):
        part = explanation.tokens[i]
        place, name = str(i), _name(part)
        for block in part.blocks[:top]:
            table.add(place, name, f"{sigmas(block.indices)} {_values(block)}", _WRITES, words(block.writes))
            table.add("", "", _gain(block), _READS, words(block.reads))
            place, name = "", Text()
        if not part.blocks:
            table.add(place, name, "", "", _ZERO)
    return table


def _unit_table(explanation: Explanation) -> Table:
    """Put the largest row and column of each token's map into words (paper, Figure 4A)."""
    table = _detail_table()
    for i in largest(explanation.tokens, DETAIL_TOKENS):
        part = explanation.tokens[i]
        if not part.rows:
            table.add(str(i), _name(part), "", "", _ZERO)
            continue
        row, column = part.rows[0], part.columns[0]
        table.add(str(i), _name(part), f"row {row.index} {number(row.norm)}", _READS, words(row.words))
        table.add("", "", f"column {column.index} {number(column.norm)}", _WRITES, words(column.words))
    return table


def _detail_table() -> Table:
    """Tables without headings: a token, a number, which way its words go, and the words."""
    return Table.of(Column("", "key"), Column("", "key"), Column(""), Column("", "parts"), Column("", "words"))


def _collapsed(tokens: Sequence[TokenExplanation]) -> list[Text]:
    shown = f"the {DETAIL_TOKENS} of {len(tokens)} tokens with the largest |share|"
    return [Text(shown, "dim italic")] if len(tokens) > DETAIL_TOKENS else []


def _gain(block: SingularBlock) -> Text:
    """Say how strongly the prompt's own embedding excites a vector; a block has no single one."""
    return Text(f"v·x {signed(block.gain)}" if block.gain is not None else "near-equal", "dim")


def _values(block: SingularBlock) -> str:
    first, last = number(block.values[0]), number(block.values[-1])
    return first if first == last else f"{first}…{last}"
