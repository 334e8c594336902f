"""The shell of a page without parts of its own: a heading, sections, and what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

from loclin.report.assets import asset
from loclin.report.text import SPACE, visible

_SHORT = 60


def sheet(
    *, title: str, about: str, heading: str, lead: str, body: str, settings: Mapping[str, Any], scripts: str = ""
) -> str:
    """Write a page; `title`, `about` and `settings` are text, the other parts are HTML already."""
    return Template(asset("sheet.html")).substitute(
        css=asset("page.css", "sheet.css"),
        title=escape(title),
        about=escape(about),
        heading=heading,
        lead=lead,
        body=body,
        settings=listed(settings),
        scripts=scripts,
    )


def section(name: str, note: str, content: str) -> str:
    """Write a section; the name is text, the rest is HTML."""
    return f'<section><h2>{escape(name)}</h2><p class="note">{note}</p>{content}</section>'


def facts(model: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put what was run into one list, long things left out."""
    known = {f"model {key}": value for key, value in model.items() if value is not None}
    plain = {key: value for key, value in settings.items() if key not in ("versions", "token_ids")}
    return known | plain | settings.get("versions", {})


def listed(settings: Mapping[str, Any]) -> str:
    """Write facts as items of a description list."""
    return "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in settings.items())


def shortened(prompt: str) -> str:
    """Shorten a prompt to a line: its end, where the prediction follows."""
    line = visible(" ".join(prompt.split())).replace(SPACE, " ")
    return line if len(line) <= _SHORT else "…" + line[-_SHORT:]


def embedded(data: Any) -> str:
    """Write JSON that can stand in a script element: no text in it can end the element or begin a tag."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
