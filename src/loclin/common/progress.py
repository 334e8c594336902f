"""How long work tells of its steps."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""Told of each step as it begins."""


def silent(_step: str) -> None:
    """Tell nobody."""
