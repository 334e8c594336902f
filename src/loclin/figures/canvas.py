"""What every figure is drawn on: its look, its fonts, words that fit their place, and how it is saved."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import figure, style
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from loclin.common.arguments import real
from loclin.errors import OptionError, first_line
from loclin.figures.fonts import find_families
from loclin.figures.names import SIDES, check_suffix
from loclin.report.text import percent, shortened, visible
from loclin.results.files import write_bytes

LOOK: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.labelsize": 6.5,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 0.9,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a token with $ is no formula
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "path",  # words in any script look the same on machines without the font
    "svg.hashsalt": "loclin",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe and Ito's, which people with any colour vision tell apart, without the yellow."""
LINE = 0.125
"""Inches that a line of words takes."""
_LEAST_LINE = 0.085
_WORD = 14


class Drawing(figure.Figure):
    """A matplotlib figure, whose own methods all work, and that keeps its look when it is saved.

    Attributes
    ----------
    warnings: those of the results that are drawn, what is left out, and characters that no installed font has.
    title: what it shows, which the file says too.
    """

    def __init__(self, title: str, look: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.title, self.warnings = title, list[str]()
        self._look, self._missing = look, ""
        self._words: list[tuple[Text, list[str], float]] = []
        self._heads: list[tuple[Text, Axes | None]] = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as .pdf, .svg or .png, completely or not at all; OutputError where that cannot be."""
        kind = check_suffix(path, (".pdf", ".svg", ".png")).removeprefix(".")
        undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
        written = io.BytesIO()
        self.savefig(written, format=kind, metadata={"Title": self.title, **undated.get(kind, {})})
        write_bytes(path, written.getvalue())

    def savefig(self, *args: Any, **options: Any) -> None:
        """As matplotlib's, with the figure's own look instead of the settings in force."""
        with wear(self._look):
            super().savefig(*args, **options)

    def letters(self, text: str) -> tuple[str, list[str]]:
        """Write a text in fonts that have its characters: those that none has become Python escapes."""
        families, missing = find_families(text)
        self._missing += "".join(character for character in missing if character not in self._missing)
        escapes = {ord(character): escape(character) for character in missing}
        return text.translate(escapes), families

    def write(self, axes: Axes, x: float, y: float, text: str, **options: Any) -> Text:
        """Write a text that has a prompt's or a model's own words in it; it takes no part in the layout."""
        shown, families = self.letters(text)
        written = axes.text(x, y, shown, fontfamily=families, **options)
        written.set_in_layout(False)
        return written

    def row(
        self,
        axes: Axes,
        y: float,
        words: Iterable[str],
        *,
        within: tuple[float, float] = (0.0, 1.0),
        right: bool = False,
    ) -> None:
        """Write words in a row, as many as there is room for within a part of the axes' width, towards either side."""
        parts = [visible(word, _WORD) for word in words] or [""]
        options: dict[str, Any] = {"ha": "right" if right else "left", "va": "center"}
        line = self.write(axes, within[right], y, "  ".join(parts), transform=axes.get_yaxis_transform(), **options)
        self._words.append((line, [self.letters(part)[0] for part in parts], within[1] - within[0]))

    def head(self, result: Any, axes: Axes | None = None) -> None:
        """Write which model and prompt it is of, and what is predicted, above a panel, or above all of them.

        A map that is not exact is said to be none.
        """
        word, probability = result.predictions[0]
        passed = result.passed if hasattr(result, "passed") else result.certificate.passed
        verdict = "" if passed else "NOT EXACT "
        name = f"{verdict}{result.provenance.model.name}: next token {visible(word, _WORD)}, {percent(probability)}"
        title, families = self.letters(f"{name}\n{shortened(result.prompt)}")
        fonts: dict[str, Any] = {"fontfamily": families, "fontsize": matplotlib.rcParams["axes.titlesize"]}
        written = (
            axes.set_title(title, loc="left", **fonts) if axes else self.suptitle(title, x=0.01, ha="left", **fonts)
        )
        self._heads.append((written, axes))

    def panel(self, axes: Axes, letter: str) -> None:
        """Write a panel's letter at its upper left corner."""
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(letter, (0, 1), (-4, 4), ha="right", va="bottom", fontweight="bold", fontsize=8, **at)

    def finish(self) -> None:
        """Lay everything out, shorten rows of words to their room, and say which characters no font has."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "constrained_layout not applied")
            try:
                self.draw_without_rendering()
            except UserWarning:
                inches = " x ".join(f"{side:g}" for side in self.get_size_inches())
                raise OptionError(f"{inches} inches are too few for {self.title}: give more width or height") from None
        for line, parts, share in self._words:
            _fit(line, parts, share)
        for head, axes in self._heads:
            _fit_head(head, (axes or self).bbox.width)
        shown = "".join(text.get_text() for text in self.findobj(Text))
        if missing := [character for character in self._missing if escape(character) in shown]:
            named = " ".join(f"{character} (U+{ord(character):04X})" for character in missing)
            self.warnings.append(
                f"No installed font has {named}: written as escapes. Install a font that has them, such as Noto Sans "
                "of their script."
            )


def escape(character: str) -> str:
    """Write a character as Python does in ASCII."""
    return character.encode("unicode_escape").decode()


def _fit(line: Text, parts: Sequence[str], share: float) -> None:
    """Leave out the last words of a row that is wider than its axes; shorten the only one."""
    axes = line.axes
    assert axes is not None
    room, kept = share * axes.bbox.width, list(parts)
    while line.get_window_extent().width > room and (len(kept) > 1 or len(kept[0]) > 1):
        kept = kept[:-1] if len(kept) > 1 else [kept[0].removesuffix("…")[:-1] + "…"]
        line.set_text("  ".join(kept))


def _fit_head(head: Text, room: float) -> None:
    """Shorten the prompt below a panel's title, from its beginning, and then the title, to some pixels."""
    title, _, prompt = head.get_text().partition("\n")
    while head.get_window_extent().width > room and len(prompt) + len(title) > 2:
        widest = prompt if len(prompt) >= len(title) else title
        if widest is prompt:
            prompt = "…" + prompt.removeprefix("…")[1:]
        else:
            title = title.removesuffix("…")[:-1] + "…"
        head.set_text(f"{title}\n{prompt}")


@contextmanager
def wear(look: dict[str, Any]) -> Iterator[None]:
    """Put on matplotlib's defaults and a look, and put the user's own settings back."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # whose names are typed one by one
        settings.update(look)
        yield


@contextmanager
def canvas(
    title: str,
    width: float,
    height: float | None,
    usual: float,
    look: str | os.PathLike[str] | None,
    results: Sequence[Any],
    lines: int = 0,
) -> Iterator[Drawing]:
    """A figure to draw on, finished at the end.

    `usual`: its height in inches unless it is given. `lines`: how many lines of words stand above one another.
    OptionError for a size that is no size, or too low for the lines, and for a style that cannot be read.
    """
    size = [real("width", width), usual if height is None else real("height", height)]
    for name, inches in zip(("width", "height"), size, strict=True):
        if not SIDES[0] <= inches <= SIDES[1]:
            raise OptionError(f"{name}={inches:g}: give inches from {SIDES[0]:g} to {SIDES[1]:g}")
    least = lines * _LEAST_LINE + 1.0
    if lines and size[1] < least:
        raise OptionError(f"height={size[1]:g}: {lines} lines of words need {least:.1f} inches; give more")
    settings = LOOK | read_style(look)
    with wear(settings):
        made = Drawing(title, settings, figsize=tuple(size), layout="constrained")
        made.warnings += gather_warnings(results)
        yield made
        made.finish()


def gather_warnings(results: Sequence[Any]) -> list[str]:
    """The warnings of all results; of several models, each with its name."""
    named = [(getattr(one, "provenance", None), warning) for one in results for warning in one.warnings]
    many = len(results) > 1
    return list(dict.fromkeys(f"{of.model.name}: {text}" if many and of else text for of, text in named))


def read_style(look: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Read a style: a .mplstyle file, or the name of one of matplotlib's."""
    if look is None:
        return {}
    if not Path(look).is_file():
        if str(look) not in style.library:
            raise OptionError(f"style={str(look)!r}: give a .mplstyle file, or one of {', '.join(style.available)}")
        return dict[str, Any](style.library[str(look)].items())
    try:
        found = matplotlib.rc_params_from_file(look, fail_on_error=True, use_default_template=False)
        return dict[str, Any](found.items())
    except (ValueError, OSError) as fault:
        raise OptionError(f"style {str(look)!r} cannot be read: {first_line(fault)}; mend it") from fault


def log_axis(axes: Axes, *names: str) -> None:
    """Make axes logarithmic, with plain numbers."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        lowest, highest = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 20 * lowest else (1,), numticks=6))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def colours(count: int) -> list[Any]:
    """A colour for each of several things; of more than eight, in the order of a scale."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return depth_colours(count)


def depth_colours(count: int) -> list[Any]:
    """Colours from dark to light, also for those who see no colours."""
    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * i / max(1, count - 1)) for i in range(count)]
