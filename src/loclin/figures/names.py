"""The names of all figures and tables, what each shows, and what it is drawn from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loclin.errors import OptionError, OutputError

Source = Literal["maps", "explain", "layers"]
"""The maps themselves, or the result of `loclin.explain` or of `loclin.explain_layers`."""


SIDES = (1.0, 60.0)
"""Inches that a figure may be wide and high."""
HIGHLIGHTS = 6
"""How many words a table may highlight."""


@dataclass(frozen=True)
class Named:
    """One figure or table: the function that draws it, a line about it, its source, and how many models it takes."""

    function: str
    about: str
    source: Source
    several: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it is text."""
        return self.function.startswith("table")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The files that it can be written to."""
        return (".tex", ".md", ".html") if self.is_table else (".pdf", ".svg", ".png")


_EXCERPT = "the first three vectors of each token in words, where the prediction appears (three layers)"
_ALL = "the same, from where the prediction appears to the last layer"
NAMES = {
    "2": Named("figure_2", "the map of every token for growing prompts, as images, and their spectra", "maps"),
    "3": Named("figure_3", "output and reconstruction: frozen map and ordinary Jacobian", "explain", several=True),
    "4a": Named("figure_4a", "the largest rows and columns of each token's map, in words", "explain"),
    "4b": Named("figure_4b", "each token's spectrum, its singular vectors in words on both sides", "explain"),
    "5": Named("figure_5", "the same for several models", "explain", several=True),
    "6": Named("figure_6", "panels A to D in one figure", "layers"),
    "6a": Named("figure_6a", "spectra of the maps to each layer, and the first vector in words", "layers"),
    "6b": Named("figure_6b", "the first two left vectors of each layer projected on the last layer's", "layers"),
    "6c": Named("figure_6c", "stable rank of the maps from the embeddings to each layer", "layers"),
    "6d": Named("figure_6d", "stable rank of each layer's own map", "layers"),
    "a1": Named("figure_a1", "figures 3 and 4b of one model", "explain"),
    **{f"table{n}": Named(f"table_{n}", _EXCERPT, "layers") for n in (1, 2, 3)},
    **{f"table{n}": Named(f"table_{n}", _ALL, "layers") for n in (5, 6, 7)},
}


def find(name: str) -> Named:
    """Find a figure or table by its name; OptionError with all names if there is none."""
    key = name.strip().lower().replace(" ", "").replace("_", "").removeprefix("figure").removeprefix("fig")
    if key not in NAMES:
        raise OptionError(f"there is no figure {name!r}: choose one of {'; '.join(listing())}")
    return NAMES[key]


def listing() -> list[str]:
    """Each name with a line."""
    return [f"{name}: {one.about}" for name, one in NAMES.items()]


def check_suffix(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> str:
    """Return a path's ending, in small letters; OutputError for another than these."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise OutputError(f"cannot write {path}: its ending must be one of {', '.join(suffixes)}; rename it")
    return suffix
