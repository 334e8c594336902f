"""Numbers are whole wherever a table is printed; in a file, everything is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.text import Text

from loclin.report.table import Bar, Column, Table, put
from loclin.results.display import show

from . import attributions
from .examples import explanation, long

WIDTHS = [30, 40, 60, 80, 100, 140]
RENDERED: dict[str, Callable[[Console], None]] = {
    "explanation": lambda console: show(explanation(), console),
    "a long prompt": lambda console: show(long(60), console),
    **{
        name: lambda console, made=made: show(made(), console)  # type: ignore[misc]
        for name, made in {"layers": attributions.layers, "heads": attributions.heads}.items()
    },
}


def table() -> Table:
    made = Table.of(
        Column("", "key"),
        Column("name", "key"),
        Column("share"),
        Column("", "bar"),
        Column("several", "parts"),
        Column("words", "words"),
        *(Column(f"number {i}") for i in range(8)),
        Column("rank", alone="rank of words"),
    )
    for row in range(3):
        numbers = [f"{row}.{i}23456789" for i in range(8)]
        several = [Text(f"left{row} +1.5{row}"), Text(f"right{row} -2.25")]
        words = " ".join(f"word{i}" for i in range(12))
        made.add(str(row), f"token{row}", f"+{row}.875", Bar(0.5), several, words, *numbers, f"{row}77")
    return made


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def file() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def numbers(text: str) -> list[str]:
    return sorted(set(re.findall(r"[-+]?\d+\.\d+(?:e[-+]\d+)?", text)))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_narrow_terminal_drops_words_and_never_digits(width: int) -> None:
    console = terminal(width)
    put(console, table())
    text = printed(console)
    assert max(map(len, text.splitlines())) <= width
    for row in range(3):
        for i in range(8):
            assert f"{row}.{i}23456789" in text
        for whole in (f"+{row}.875", f"left{row} +1.5{row}", f"right{row} -2.25", f" {row}77", f"token{row}"):
            assert whole in text


def test_what_is_left_out_is_said_and_headings_stand_alone() -> None:
    console = terminal(30)
    put(console, table())
    assert "left out here: words" in printed(console)
    assert "rank of words" in printed(console)
    assert "█" not in printed(console)


def test_a_file_gets_every_column_whole_in_one_table() -> None:
    console = file()
    put(console, table())
    lines = printed(console).splitlines()
    assert len(lines) == 4
    assert all("word0 word1" in line and "word11" in line and "██▌" in line for line in lines[1:])
    assert "left out" not in printed(console)


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_every_number_of_a_report_is_whole_at_every_width(name: str, width: int) -> None:
    whole, narrow = file(), terminal(width)
    RENDERED[name](whole)
    RENDERED[name](narrow)
    text = printed(narrow)
    assert set(numbers(printed(whole))) <= set(numbers(text))
    assert max(map(len, text.splitlines())) <= width


def test_a_file_cuts_no_words_off() -> None:
    console = file()
    made = explanation()
    show(made, console)
    for word in ("·left right", "stable rank", "reads (σ1)", "the map is zero"):
        assert word in printed(console)


def test_markdown_takes_nothing_in_a_cell_for_its_own() -> None:
    made = Table.of(Column("name", "key"), Column("of"), Column("", "bar"))
    made.add("a|b <c>", Text("x_y", "code"), Bar(1.0))
    made.add(Text("*bold*", "bold"), [Text("one"), Text("two")])
    assert made.markdown().splitlines() == [
        "| name | of |  |",
        "| --- | --- | --- |",
        r"| a\|b \<c\> | `x_y` |  |",
        r"| \*bold\* | one  two |  |",
    ]
