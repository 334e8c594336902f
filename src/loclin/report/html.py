"""Reports as HTML: a page that needs no other file and no network, and a fragment for a notebook, without scripts.

Templates escape whatever they are given; the pieces that are HTML already are made here and by macros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.text import Span, Text

from loclin.report.plot import plotly_script
from loclin.report.sheet import NOTEBOOK, PAGE, Figure, Sheet, describe
from loclin.report.table import BEYOND, Bar, Cell, pieces
from loclin.report.text import error, number, percent, signed, token

_FULL = 0.78
"""How opaque a full colour is."""


def page(result: object) -> str:
    """Write a result, or several of one prompt, as a self-contained HTML page."""
    sheet = describe(result, PAGE)
    blocks = [block for section in sheet.sections for block in section.blocks]
    drawn = {block.id: block.draw() for block in blocks if isinstance(block, Figure)}
    return write_page("base.html", sheet, {"figures": drawn} if drawn else None, "draw.js")


def fragment(result: object) -> str:
    """Write a result as a piece of HTML for a notebook's output: static, and in the notebook's own colours."""
    return _environment().get_template("fragment.html").render(sheet=describe(result, NOTEBOOK))


def write_page(template: str, sheet: Sheet, data: Any, *scripts: str, plots: bool = True, **more: Any) -> str:
    """Fill a template that extends `base.html`: `data` is what its scripts read, None for a page without any.

    `plots`: whether they draw with plotly.
    """
    plotly = plotly_script() if plots and data is not None else ""
    code = {} if data is None else {"plotly": plotly, "script": asset("shared.js", *scripts)}
    page = _environment().get_template(template)
    return page.render(sheet=sheet, data=None if data is None else embedded(data), **code, **more)


def embedded(data: Any) -> str:
    """Write JSON that can stand in a script element: no text in it can end the element or begin a tag."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("loclin.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"inline": inline, "style": lambda name: Markup(asset(name))}
    found.globals |= {"full": _FULL, "beyond": BEYOND, "form_of": lambda block: type(block).__name__}
    found.globals |= {"token": token, "percent": percent, "number": number, "signed": signed, "error": error}
    return found


def inline(cell: Cell) -> Markup:
    """Write a cell: styles become classes, and all text is escaped."""
    if isinstance(cell, Bar):
        side, size = "neg" if cell.size < 0 else "pos", abs(cell.size)
        clipped = " beyond" if size > BEYOND else ""
        bar = '<span class="balance"><span class="{}" style="width:{:.1f}%"></span></span>'
        return Markup(bar).format(side + clipped, 50 * min(size, 1.0))
    if isinstance(cell, str):
        return escape(cell)
    if not isinstance(cell, Text):
        return Markup(" ").join(map(inline, pieces(cell)))
    spans = [Span(0, len(cell), cell.style), *cell.spans] if cell.style else cell.spans
    inside = "".join(_nested(cell.plain, 0, len(cell), sorted(spans, key=lambda s: (s.start, -s.end))))
    return Markup(inside)


def _nested(text: str, start: int, end: int, spans: Sequence[Span]) -> Iterator[str]:
    """Write a piece of text with elements for its spans, those that lie within others inside them."""

    def plain(piece: str) -> str:
        return str(escape(piece)).replace("\n", "<br>")

    spans = [span for span in spans if span.start < span.end]
    while spans:
        first, *others = spans
        inner = [span for span in others if span.end <= first.end]
        spans = [span for span in others if span.start >= first.end]
        yield plain(text[start : first.start])
        yield f'<span class="{escape(_classes(str(first.style)))}">'
        yield from _nested(text, first.start, first.end, inner)
        yield "</span>"
        start = first.end
    yield plain(text[start:end])


def _classes(style: str) -> str:
    """Turn a style of rich into classes, what it takes away aside."""
    names = style.split()
    return " ".join(name for name, before in zip(names, ["", *names[:-1]], strict=True) if "not" not in (name, before))


def asset(*names: str) -> str:
    """Read some of the style sheets and scripts, one behind the other."""
    here = files("loclin.report") / "assets"
    return "".join((here / name).read_text("utf-8") for name in names)
