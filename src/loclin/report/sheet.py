"""What a report says, whatever it is drawn on: made once for each kind of result by `describe`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from loclin.common.brief import brief
from loclin.report import run
from loclin.report.table import WIDEST, Cell, Column, Table, put
from loclin.report.text import number, plain, shortened, token
from loclin.results.result import Result

PROMPT_HEAD, PROMPT_TAIL = 40, 80
"""How much of a prompt a terminal shows when it is longer than both together: its beginning and its end."""
KEY = "full colour: the largest share of a word"
"""What a prompt's chips are coloured by where they are."""


@dataclass(frozen=True)
class Limits:
    """How much a medium has room for: tokens of a prompt in a table, parts of an attribution, vectors of a token."""

    tokens: int
    parts: int = 20
    vectors: int = 3


TERMINAL, NOTEBOOK, PAGE = Limits(40), Limits(24), Limits(100_000, 40)


@dataclass(frozen=True)
class Chip:
    """A token of the prompt; `depth` is its part of the full colour, `title` what is said when it is pointed at."""

    text: str
    depth: float = 0.0
    title: str = ""
    marks: Sequence[str] = ()

    __repr__ = brief


@dataclass(frozen=True)
class Shade:
    """A cell of a `Heat`, as deep in colour as it is large; one that is None is empty."""

    depth: float | None
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Heat:
    """A matrix as coloured cells, on pages and in notebooks."""

    columns: list[tuple[Text, int]]  # the heads, and how many columns each one spans
    rows: list[tuple[Text, list[Shade], Text]]  # what names a row, its cells, and what stands behind them
    note: str = ""  # below it
    caption: Text | None = None  # above it

    __repr__ = brief


@dataclass(frozen=True)
class Figure:
    """A plotly figure, on pages only; drawn when a page is."""

    id: str
    label: str
    draw: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Folded:
    """Blocks that a page shows when they are asked for, and a terminal does not."""

    summary: Text
    blocks: list[Block]

    __repr__ = brief


@dataclass(frozen=True)
class Sayings:
    """Texts side by side: a name, the text, and its frame's style."""

    texts: list[tuple[str, Text, str]]

    __repr__ = brief

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Draw them in frames, one below the other where it is narrow."""
        width = min(options.max_width, WIDEST)
        half = (width - 1) // 2 if width >= 80 else width
        framed = (_framed(text, f"[bold]{name}[/]", style, width=half) for name, text, style in self.texts)
        yield Columns(framed, padding=(0, 1))


Block = Text | Table | Heat | Figure | Folded | Sayings


@dataclass(frozen=True)
class Section:
    """A heading, what is said below it, and blocks; without a title its blocks stand alone."""

    title: str
    note: str
    blocks: list[Block]

    __repr__ = brief


@dataclass(frozen=True)
class Sheet:
    """A report."""

    title: str
    about: str  # which kind of report it is
    sections: list[Section]
    heading: Text | None = None  # the title as a page shows it; None for the same
    chips: list[Chip] = field(default_factory=list)
    key: str = ""  # what the colours of the chips mean
    lead: list[Text] = field(default_factory=list)  # what is explained, whether the map is exact
    notes: list[str] = field(default_factory=list)  # what is to be known of all numbers
    warnings: list[str] = field(default_factory=list)
    run: run.Run = field(default_factory=run.Run)

    __repr__ = brief


def sheet_of(result: Any, about: str, sections: list[Section], *, kind: str = "", **more: Any) -> Sheet:
    """Make the sheet of a result: its prompt, warnings and what was run are the result's, if not in `more`."""
    title = ": ".join(filter(None, (kind, shortened(run.prompt(result)))))
    chips = [Chip(text) for text in run.tokens(result)]
    known = {"title": title, "chips": chips, "warnings": result.warnings, "run": run.run_of(result)}
    return Sheet(**known | {"about": about, "sections": sections} | more)


def full_size(sizes: Iterable[tuple[float, bool]]) -> float:
    """Find the size to draw in full: the largest, those of sinks aside, which would dwarf all others."""
    known = [(abs(size), is_sink) for size, is_sink in sizes]
    word = max((size for size, is_sink in known if not is_sink), default=0.0)
    return word or max((size for size, _ in known), default=0.0) or 1.0


@singledispatch
def describe(result: object, _limits: Limits = PAGE) -> Sheet:
    """Say what a result shows, as much as there is room for."""
    raise TypeError(f"a {type(result).__name__} has no report")


@describe.register
def describe_table(result: Result, limits: Limits = PAGE) -> Sheet:
    """Show the table of a result that has no description of its own."""
    columns, name = result.table(), type(result).__name__
    rows = list(zip(*columns.values(), strict=True))
    texts = {title for title, values in columns.items() if any(isinstance(value, str) for value in values)}
    table = Table.of(
        *(Column(title.replace("_", " "), "key" if title in texts else "number") for title in columns),
        rows=(list(map(_value, columns, row)) for row in rows[: limits.tokens]),
    )
    section = Section(name, str(getattr(result, "task", "")), [table, *left_out(len(rows) - limits.tokens)])
    return sheet_of(result, f"a result of loclin: {name}", [section], kind=name)


def left_out(hidden: int) -> list[Text]:
    """Say below a table how many rows it leaves out, where it leaves out any."""
    return [Text(f"and {hidden} more", "dim italic")] if hidden > 0 else []


def _value(name: str, value: Any) -> Cell:
    if isinstance(value, str) and name in ("text", "word"):
        return token(value, "bold")
    return number(value) if isinstance(value, float) else "" if value is None else plain(str(value))


@describe.register(list)
def describe_several(results: list[Any], limits: Limits = PAGE) -> Sheet:
    """Put reports of one prompt together."""
    sheets = [describe(result, limits) for result in results]
    coloured = next((sheet for sheet in sheets if any(chip.depth for chip in sheet.chips)), sheets[0])
    return replace(
        sheets[0],
        sections=[section for sheet in sheets for section in sheet.sections],
        chips=coloured.chips,
        key=coloured.key,
        warnings=list(dict.fromkeys(text for sheet in sheets for text in sheet.warnings)),
    )


def show(result: object, console: Console | None = None, *, top: int | None = None) -> None:
    """Print a result that `describe` knows, on a console or on standard output: `top` shares, or vectors of a token."""
    limits = TERMINAL if top is None else replace(TERMINAL, parts=top, vectors=top)
    sheet = describe(result, limits)
    parts: list[RenderableType] = [*([_prompt(sheet.chips)] if sheet.chips else []), *sheet.lead]
    for section in sheet.sections:
        printed = [block for block in section.blocks if isinstance(block, Text | Table | Sayings)]
        parts += [Text(), Heading(section.title, section.note)] if section.title and printed else []
        parts += printed
    closing: list[RenderableType] = [
        *(Text(note, "dim") for note in sheet.notes),
        *(_framed(Text(text), "warning", "yellow") for text in sheet.warnings),
    ]
    closing += [sheet.run.line] if sheet.run.facts else []
    put(Console() if console is None else console, *parts, *([Text()] if closing else []), *closing)


def _framed(text: Text, title: str, style: str, **more: Any) -> Panel:
    return Panel(text, title=title, title_align="left", border_style=style, **more)


@dataclass(frozen=True)
class Heading:
    """Write a title, and what stands below it; without its line where both would not fit."""

    title: str
    note: str

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Draw it."""
        text = Text.assemble((self.title, "bold"), (f"  {self.note}", "dim"))
        yield text if text.cell_len + 2 > options.max_width else Rule(text, align="left", style="dim")


def _prompt(chips: Sequence[Chip]) -> Text:
    """Write the prompt token by token: every gap is a boundary, since its own spaces are drawn."""
    shown = [token(chip.text, "bold", ["sink"] if "sink" in chip.marks else []) for chip in chips]
    hidden = len(shown) - PROMPT_HEAD - PROMPT_TAIL
    if hidden > 0:
        shown[PROMPT_HEAD:-PROMPT_TAIL] = [Text(f"… {hidden} more tokens …", "dim italic")]
    return Text(" ").join(shown)
