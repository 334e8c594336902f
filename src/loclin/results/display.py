"""How a result shows itself in a notebook: `loclin.report` registers a form for each kind."""

from __future__ import annotations

from functools import singledispatch


@singledispatch
def as_html(_result: object) -> str | None:
    """A result as a piece of HTML; None where nothing is registered, and a notebook shows its text."""
    return None


class Shown:
    """A result that a notebook shows as HTML."""

    def _repr_html_(self) -> str | None:
        return as_html(self)
