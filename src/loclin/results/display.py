"""Hooks with which results show themselves. `loclin.report` registers an implementation for each class."""

from __future__ import annotations

from functools import singledispatch
from typing import Any


@singledispatch
def fragment(result: object) -> str:
    """Render a result as a piece of HTML, for a notebook."""
    raise NotImplementedError(f"loclin.report has no form for {type(result).__name__}")


@singledispatch
def page(result: object) -> str:
    """Render a result as a complete HTML page."""
    raise NotImplementedError(f"loclin.report has no page for {type(result).__name__}")


@singledispatch
def show(result: object, console: Any = None, **options: Any) -> None:  # noqa: ARG001
    """Print a result on a terminal: on a rich console, or on standard output; options are `loclin.report`'s."""
    raise NotImplementedError(f"loclin.report has no terminal form for {type(result).__name__}")
