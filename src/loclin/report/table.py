"""Tables, made once and drawn on a terminal, in HTML and in Markdown.

On a terminal they fit where they are printed: words give way, numbers never do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from loclin.common.brief import brief

Kind = Literal["key", "number", "parts", "words", "bar"]
WIDEST = 120
"""Wider than this, lines of text are hard to read; a table may still be."""
BEYOND = 1.005
"""Parts of the full size from which on something is drawn as clipped: half a pixel more than full."""
_LEAST_WORDS, _LEAST_KEY = 8, 9
_BETWEEN = "  "
_BAR = 5
"""Cells of a bar on either side of zero on a terminal; a cell is drawn in halves."""
_MIRRORED = str.maketrans("▶▌", "◀▐")


@dataclass(frozen=True)
class Bar:
    """A small bar of a part of the full length, left of the axis when negative; an arrow marks one that is longer."""

    size: float

    def __str__(self) -> str:
        return str(self.text)

    @property
    def text(self) -> Text:
        """The bar in characters."""
        halves = round(2 * _BAR * abs(self.size))
        bar = "█" * (_BAR - 1) + "▶" if halves > 2 * _BAR else "█" * (halves // 2) + "▌" * (halves % 2)
        left, right = (bar[::-1].translate(_MIRRORED), "") if self.size < 0 else ("", bar)
        return Text.assemble((left.rjust(_BAR), "red"), ("│", "dim"), (right.ljust(_BAR), "green"))


Cell = str | Text | Bar | Sequence[Text]
"""A text, a bar, or several pieces of which none may be broken."""


@dataclass(frozen=True)
class Column:
    """A column of a `Table`, of one of these kinds.

    `key`: names the row, and comes again where a table is folded; the last of them breaks into lines first. `number`:
    never shortened and never left out; `parts` neither, but on the left. `words`: shortened, then left out. `bar`: left
    out.
    """

    name: str | Text
    kind: Kind = "number"
    alone: str = ""  # its heading where columns of words are left out, for one whose name leans on theirs


COUNTER, BAR = Column("", "key"), Column("", "bar")


@dataclass(frozen=True)
class Row:
    """Cells, the prompt's token that a page may choose by them, and whether they sum up the rows above."""

    cells: list[Cell]
    token: int | None = None
    is_sum: bool = False

    __repr__ = brief


@dataclass
class Table:
    """A table that fits its console.

    A file or a pipe has no edge: there everything is printed. A terminal has one: words are shortened, then columns of
    bars and of words are left out, and said to be; what numbers are left over come in a second table below.
    """

    columns: list[Column]
    rows: list[Row] = field(default_factory=list)

    __repr__ = brief

    @classmethod
    def of(cls, *columns: Column | str, rows: Iterable[Sequence[Cell]] = ()) -> Table:
        """Begin a table; a column of which only the name is given has numbers."""
        made = cls([Column(column) if isinstance(column, str) else column for column in columns])
        for row in rows:
            made.add(*row)
        return made

    def add(self, *cells: Cell, token: int | None = None, is_sum: bool = False) -> None:
        """Add a row; cells that are not given are empty."""
        self.rows.append(Row([*cells, *[""] * (len(self.columns) - len(cells))], token, is_sum))

    @property
    def is_headed(self) -> bool:
        """Whether any column has a name."""
        return any(str(column.name) for column in self.columns)

    @property
    def is_clipped(self) -> bool:
        """Whether any bar is longer than it is drawn."""
        return any(isinstance(cell, Bar) and abs(cell.size) > BEYOND for row in self.rows for cell in row.cells)

    def markdown(self) -> str:
        """Write it in Markdown."""
        lines = [[_marked(column.name) for column in self.columns], ["---"] * len(self.columns)]
        lines += [[_marked(cell) for cell in row.cells] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType | Segment]:
        """Draw it."""
        everything, limit = list(range(len(self.columns))), options.max_width
        if not console.is_terminal:
            return self._drawn(everything, self._widths(), console, options)
        kept = self._kept(limit)
        names = [str(c.name) or "words" for i, c in enumerate(self.columns) if c.kind == "words" and i not in kept]
        columns = [replace(column, name=column.alone or column.name) for column in self.columns]
        shown = replace(self, columns=columns) if names else self
        parts = shown._folded(limit, kept)
        drawn = [shown._drawn(part, shown._fitted(limit, part), console, options) for part in parts]
        notes = [Text(f"left out here: {', '.join(names)}", "dim italic")] if names else []
        return [*chain.from_iterable(drawn), *notes]

    def _of(self, *kinds: Kind) -> list[int]:
        return [i for i, column in enumerate(self.columns) if column.kind in kinds]

    def _cells(self, i: int) -> list[Cell]:
        return [self.columns[i].name, *(row.cells[i] for row in self.rows)]

    def _widths(self) -> list[int]:
        return [max(map(_length, self._cells(i))) for i in range(len(self.columns))]

    def _least(self) -> list[int]:
        """The fewest cells that each column does with."""
        least = [max(map(_unbroken, self._cells(i))) for i in range(len(self.columns))]
        widths = self._widths()
        for i in self._of("words"):
            broken = all(isinstance(cell, str | Text) for cell in self._cells(i))
            least[i] = min(widths[i], _LEAST_WORDS if broken else max(_LEAST_WORDS, least[i]))
        for i in self._of("key")[-1:]:
            least[i] = min(widths[i], _LEAST_KEY)
        return least

    def _kept(self, limit: int) -> list[int]:
        """Which columns there is room for: bars are left out first, then words, the last of them first."""
        least, kept = self._least(), list(range(len(self.columns)))
        for i in [*reversed(self._of("bar")), *reversed(self._of("words"))]:
            if _total(least[j] for j in kept) > limit:
                kept.remove(i)
        return kept

    def _folded(self, limit: int, shown: Sequence[int]) -> list[list[int]]:
        """Put the columns into as many tables as it takes; each begins with the keys."""
        least, keys = self._least(), self._of("key")
        parts = [list(keys)]
        for i in (i for i in shown if i not in keys):
            if len(parts[-1]) > len(keys) and _total(least[j] for j in [*parts[-1], i]) > limit:
                parts.append(list(keys))
            parts[-1].append(i)
        return [sorted(part) for part in parts]

    def _fitted(self, limit: int, part: Sequence[int]) -> list[int]:
        """Share the room out: numbers have theirs, keys come next, and words divide the rest."""
        widths, found = self._widths(), self._least()
        for kinds in (("number", "parts", "bar"), ("key",), ("words",)):
            growing = [i for i in part if self.columns[i].kind in kinds and found[i] < widths[i]]
            while growing and (room := limit - _total(found[i] for i in part)) > 0:
                for i in growing:
                    found[i] = min(widths[i], found[i] + max(1, room // len(growing)))
                    found[i] -= max(0, _total(found[j] for j in part) - limit)
                growing = [i for i in growing if found[i] < widths[i]]
        return found

    def _drawn(
        self, part: Sequence[int], widths: Sequence[int], console: Console, options: ConsoleOptions
    ) -> Iterable[Segment]:
        """A table of some columns, as wide as it is: rich would take cells from numbers to make it fit."""
        table = RichTable(
            box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False, show_header=self.is_headed
        )
        for i in part:
            column = self.columns[i]
            counter = i == 0 and not column.name
            table.add_column(
                _joined(column.name, widths[i]),
                justify="right" if counter or column.kind == "number" else "left",
                style="dim" if counter else "",
                no_wrap=column.kind != "key",
                overflow="fold" if column.kind == "key" else "ellipsis",
                width=widths[i],
            )
        for row in self.rows:
            table.add_row(*(_joined(row.cells[i], widths[i]) for i in part))
        return console.render(table, options.update(width=max(options.max_width, _total(widths[i] for i in part))))


def put(console: Console, *parts: RenderableType) -> None:
    """Print texts and tables, none of them wider than a page; tables in files as wide as they are."""
    console.print(Group(*parts), width=min(console.width, WIDEST), crop=False)


def _total(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + len(each)  # a space behind every column


def pieces(cell: Cell) -> Sequence[str | Text | Bar]:
    """Take a cell apart into what may not be broken."""
    return [cell] if isinstance(cell, str | Text | Bar) else cell


def _length(cell: Cell) -> int:
    return cell_len(_BETWEEN.join(str(piece) for piece in pieces(cell)))


def _unbroken(cell: Cell) -> int:
    """How many cells the widest piece takes."""
    return max((cell_len(str(piece)) for piece in pieces(cell)), default=0)


def _joined(cell: Cell, width: int) -> RenderableType:
    if isinstance(cell, Bar):
        return cell.text
    if isinstance(cell, Text):
        return cell
    if isinstance(cell, str):
        return Text(cell)  # rich reads markup in a plain string
    return Text(_BETWEEN if _length(cell) <= width else "\n").join(cell)


def _marked(cell: Cell) -> str:
    """Write a cell so that Markdown takes nothing in it for its own; code is said to be."""
    if isinstance(cell, Bar):
        return ""
    if isinstance(cell, Text) and cell.style == "code":
        return f"`{cell}`"
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", _BETWEEN.join(map(str, pieces(cell))))
