"""The paper's figures and tables, each by one function: drawn from a linearized prompt, or from a saved result.

>>> figure = loclin.figures.figure_6(lin)  # a matplotlib figure
>>> figure.save("fig6.pdf")  # or .svg, .png
>>> loclin.figures.table_1(lin).save("table1.tex")  # or .md, .html

Text in PDF files stays text, in fonts that have its scripts; in SVG files it is outlines, which look the same
everywhere. Nothing here changes matplotlib's settings, or needs pyplot. Without matplotlib (`pip install
"loclin[figures]"`) there are the tables alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loclin.errors import MissingExtraError

if TYPE_CHECKING:
    from loclin.figures.canvas import Drawing
    from loclin.figures.layers import figure_6, figure_6a, figure_6b, figure_6c, figure_6d
    from loclin.figures.maps import figure_2
    from loclin.figures.names import NAMES
    from loclin.figures.tokens import figure_3, figure_4a, figure_4b, figure_5, figure_a1
    from loclin.figures.words import WordRow, WordTable, table_1, table_2, table_3, table_5, table_6, table_7

__all__ = [
    "NAMES",
    "Drawing",
    "WordRow",
    "WordTable",
    "figure_2",
    "figure_3",
    "figure_4a",
    "figure_4b",
    "figure_5",
    "figure_6",
    "figure_6a",
    "figure_6b",
    "figure_6c",
    "figure_6d",
    "figure_a1",
    "table_1",
    "table_2",
    "table_3",
    "table_5",
    "table_6",
    "table_7",
]
_HOMES = {"NAMES": "names", "Drawing": "canvas", "figure_2": "maps"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the command line checks its options without torch and matplotlib."""
    if name not in __all__:
        raise AttributeError(f"module 'loclin.figures' has no attribute {name!r}")
    kind = "layers" if name.startswith("figure_6") else "tokens" if name.startswith("figure") else "words"
    try:
        return getattr(import_module(f"loclin.figures.{_HOMES.get(name, kind)}"), name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "matplotlib":
            raise
        raise MissingExtraError("a figure", "matplotlib", "figures") from missing
