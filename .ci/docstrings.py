"""The docstrings as griffe reads them for the site: what stands behind `name:` is put under the name."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Parameters|Attributes|Raises|Returns)\n-+\n", flags=re.M)
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): (\S.*)$", flags=re.M)


def unfold(text: str) -> str:
    """A docstring whose sections have each name on its own line, and end at the first empty line; prose comes first."""
    first, *parts = _SECTION.split(text)
    prose, sections = [first], []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        entries, _, after = body.partition("\n\n")
        entries = _ENTRY.sub(r"\1\n    \2", entries)
        sections.append(f"{title}\n{'-' * len(title)}\n{entries}")
        prose.append(after)
    return "\n\n".join(part.strip() for part in [*prose, *sections] if part.strip())


class UnfoldDocstrings(griffe.Extension):
    """Every docstring as `unfold` gives it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = unfold(obj.docstring.value)
