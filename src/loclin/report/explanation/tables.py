"""The tables of an explanation on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.text import Text

from loclin.analyses.decode import Words
from loclin.analyses.explain import Explanation, SingularBlock, TokenExplanation
from loclin.report.choose import full_colour, largest
from loclin.report.grid import Column, Grid
from loclin.report.text import EMPTY, NEWLINE, SPACE, TAB, error, number, sigmas, signed, visible

TABLE_TOKENS = 40
DETAIL_TOKENS = 12
BAR = 5
"""Cells of a share's bar on either side of zero; a cell is drawn in halves."""
_TOKEN_LIMIT = 20
_READS, _WRITES = Text("reads", "dim"), Text("writes", "dim")
_ZERO = Text("the map is zero", "dim italic")
_MARK = re.compile(f"[{SPACE}{NEWLINE}{TAB}{EMPTY}]")


def token_text(text: str, style: str, is_sink: bool = False) -> Text:
    """Dim a token's drawn whitespace; give a `Text`, so that nothing in it is read as markup."""
    shown = Text(visible(text, _TOKEN_LIMIT), style)
    shown.highlight_regex(_MARK, "dim")
    if is_sink:
        shown.append("◂sink", "yellow not bold")
    return shown


def words_text(words: Words) -> Text:
    """Put words in a row, the best first."""
    return Text(" ").join(token_text(word, "") for word, _ in words)


def bar(value: float, full: float) -> Text:
    """Draw a small bar, left of the axis when negative; an arrow at its end says that it is longer."""
    size = abs(value) / full
    whole, half = divmod(round(2 * BAR * min(size, 1.0)), 2)
    beyond = round(2 * BAR * size) > 2 * BAR
    if value < 0:
        left, right = ("◀" + "█" * (BAR - 1) if beyond else "▐" * half + "█" * whole), ""
    else:
        left, right = "", ("█" * (BAR - 1) + "▶" if beyond else "█" * whole + "▌" * half)
    return Text.assemble((left.rjust(BAR), "red"), ("│", "dim"), (right.ljust(BAR), "green"))


def share_table(explanation: Explanation) -> Iterator[Grid | Text]:
    """Give a row to each token, one to the biases, and the total; the largest word's bar is full."""
    tokens = explanation.tokens
    shown = list(range(len(tokens))) if len(tokens) <= TABLE_TOKENS else largest(tokens, TABLE_TOKENS)
    full = full_colour(tokens)
    table = Grid.of(
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
        table.add(str(i), *_share_row(tokens[i], full))
    if len(shown) < len(tokens):
        rest = sum(token.share for token in tokens) - sum(tokens[i].share for i in shown)
        table.add("", Text(f"{len(tokens) - len(shown)} others", "italic"), signed(rest))
    bias = explanation.bias_share
    table.add("", Text("bias", "italic"), signed(bias), bar(bias, full))
    total = sum(token.share for token in tokens) + bias
    table.add("", Text("total", "bold"), Text(signed(total), "bold"))
    yield table
    sums = Text(f"the total is the {explanation.target['kind']}, {number(explanation.target['value'])}", "bold")
    yield sums.append(f"   rounding {error(abs(explanation.share_residual))}", "not bold dim")
    if len(shown) < len(tokens):
        yield Text(f"above: the {len(shown)} largest", "dim italic")


def _share_row(token: TokenExplanation, full: float) -> list[Text]:
    first = token.blocks[0] if token.blocks else None
    return [
        token_text(token.text, "bold", token.is_sink),
        Text(signed(token.share)),
        bar(token.share, full),
        Text(f"{token.frobenius_norm:.3g}"),
        Text(f"{token.stable_rank:.2f}"),
        words_text(first.writes) if first else _ZERO,
        words_text(first.reads) if first else Text(),
    ]


def block_table(explanation: Explanation, top: int) -> Iterator[Grid | Text]:
    """Put the `top` singular blocks of each token into words; of a long prompt, the tokens that matter."""
    table = _detail_table()
    for i, token in _detailed(explanation.tokens):
        place, name = str(i), token_text(token.text, "bold", token.is_sink)
        for block in token.blocks[:top]:
            label = f"{sigmas(block.indices)} {_values(block)}"
            table.add(place, name, label, _WRITES, words_text(block.writes))
            table.add("", "", _gain(block), _READS, words_text(block.reads))
            place, name = "", Text()
        if not token.blocks:
            table.add(place, name, "", "", _ZERO)
    yield from _collapsed(explanation.tokens)
    yield table


def unit_table(explanation: Explanation) -> Iterator[Grid | Text]:
    """Put the largest row and column of each token's map into words (paper, Figure 4A)."""
    table = _detail_table()
    for i, token in _detailed(explanation.tokens):
        name = token_text(token.text, "bold", token.is_sink)
        if not token.rows:
            table.add(str(i), name, "", "", _ZERO)
            continue
        row, column = token.rows[0], token.columns[0]
        table.add(str(i), name, f"row {row.index} {number(row.norm)}", _READS, words_text(row.words))
        label = f"column {column.index} {number(column.norm)}"
        table.add("", "", label, _WRITES, words_text(column.words))
    yield from _collapsed(explanation.tokens)
    yield table


def _detail_table() -> Grid:
    """Tables without headings: a token, a number, which way its words go, and the words."""
    return Grid.of(Column("", "key"), Column("", "key"), Column(""), Column("", "parts"), Column("", "words"))


def _detailed(tokens: Sequence[TokenExplanation]) -> list[tuple[int, TokenExplanation]]:
    return [(i, tokens[i]) for i in largest(tokens, DETAIL_TOKENS)]


def _collapsed(tokens: Sequence[TokenExplanation]) -> Iterator[Text]:
    if len(tokens) > DETAIL_TOKENS:
        yield Text(f"the {DETAIL_TOKENS} of {len(tokens)} tokens with the largest |share|", "dim italic")


def _gain(block: SingularBlock) -> Text:
    """Say how strongly the prompt's own embedding excites a vector; a block has no single one."""
    return Text(f"v·x {signed(block.gain)}" if block.gain is not None else "near-equal", "dim")


def _values(block: SingularBlock) -> str:
    first, last = number(block.values[0]), number(block.values[-1])
    return first if first == last else f"{first}…{last}"
