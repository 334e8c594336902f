"""Checks of arguments before any work: texts, lists of texts, whole numbers and finite numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

from loclin.errors import OptionError, PromptError


def strings(name: str, given: Any) -> list[str]:
    """A list of strings; OptionError for anything else, and for one string, which would read as a list of letters."""
    if isinstance(given, str):
        raise OptionError(f"{name}={given!r} is one string: give a list, {name}=[{given!r}]")
    try:
        found = list(given)
    except TypeError:
        raise OptionError(f"{name}={given!r}: give a list of strings") from None
    for one in found:
        if not isinstance(one, str):
            raise OptionError(f"{name} holds {one!r}: give a list of strings")
    return found


def whole(name: str, given: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number in a range, also NumPy's or a tensor's, as an int; OptionError for anything else, also bools."""
    try:
        found = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        bounds = "" if least is None else f" from {least}" if most is None else f" from {least} to {most}"
        raise OptionError(f"{name}={given!r}: give a whole number{bounds}")
    return found


def real(name: str, given: Any, least: float | None = None, above: float | None = None) -> float:
    """A finite number from `least` on, or above `above`, also NumPy's or a tensor's, as a float; else OptionError."""
    try:
        found = math.nan if isinstance(given, bool | str) else float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # not a number, or several
        found = math.nan
    if not math.isfinite(found) or (least is not None and found < least) or (above is not None and found <= above):
        bounds = f" above {above:g}" if above is not None else "" if least is None else f" of {least:g} or more"
        raise OptionError(f"{name}={given!r}: give a finite number{bounds}")
    return found


def text(name: str, given: str) -> str:
    """A text that every tokenizer and file can take; PromptError if it is empty, or has lone surrogates."""
    if not given:
        raise PromptError(f"{name} is empty: give some text")
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(given[error.start]):04X}"
        raise PromptError(
            f"{name} has a lone surrogate, {half}, at character {error.start + 1}: give whole characters"
        ) from None
    return given
