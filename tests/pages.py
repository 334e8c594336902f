"""Pages of Markdown whose blocks of code are run, and print what stands on the page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from rich.console import Console
from typer.testing import CliRunner

from loclin.cli import app

NUMBER = r"(?<![\w.·-])[-+]?\d+(?:\.\d+)?(?!\.?\w)"
ROUNDING = r"\d(?:\.\d)?e-\d\d"
"""What rounding leaves is another number on another CPU."""
LOOK = r"[│█▌▐▏▎▍▋▊▉▶◀─\s]"
"""Bars, rules and spaces: a bar has the last digit of its number, and a column the width of all of them."""


@dataclass(frozen=True)
class Block:
    """A block of code, and what the page says that it prints: the block of text behind it."""

    language: str
    code: str
    printed: str | None


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```\n", text, flags=re.S | re.M))
    behind = [text[a.end() : b.start()].isspace() and b[1] == "text" for a, b in pairwise(found)]
    printed = [b[2] if shown else None for shown, b in zip(behind, found[1:], strict=True)]
    return [Block(one[1], one[2], shown) for one, shown in zip_longest(found, printed)]


def numbers(line: str) -> list[str]:
    return re.findall(NUMBER, re.sub(ROUNDING, "", line))


def words(line: str) -> str:
    """A line without its numbers and its look."""
    return re.sub(LOOK, "", re.sub(NUMBER, "", re.sub(ROUNDING, "", line)))


def same(line: str, printed: str) -> bool:
    """Whether a line is the one that was printed, up to where it is cut."""
    line, *cut = re.split("…", line, maxsplit=1)
    written = numbers(line)
    spoken = words(printed).startswith(words(line)) if cut else words(printed) == words(line)
    pairs = zip_longest(written, numbers(printed)[: len(written)])
    return spoken and all(b is not None and close(a, b) for a, b in pairs)


def close(written: str, found: str) -> bool:
    """Whether two numbers are the same, but for the last digit written and what another CPU rounds."""
    digit = 10.0 ** -len(written.partition(".")[2]) if "." in written else 0.0
    return abs(float(written) - float(found)) <= 1.5 * digit + 1e-3 * abs(float(written))


def missing(lines: Iterable[str], printed: str) -> list[str]:
    """The first line of a page that was not printed, or not in its place; a line of … stands for any number of them."""
    rest = iter(printed.splitlines())
    return next(([line] for line in lines if line.strip(" …") and not any(same(line, found) for found in rest)), [])


def run(command: str, monkeypatch) -> str:
    """What a command prints to its standard output."""
    monkeypatch.setattr("loclin.cli.console.stdout", console := Console(width=120, record=True))
    monkeypatch.setattr("loclin.cli.console.stderr", Console(stderr=True, quiet=True))
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return console.export_text()
