"""Plain values that a person gives, checked before any work: whole numbers, numbers, texts."""

from __future__ import annotations

import math
import operator
from typing import Any

from loclin.errors import OptionError, PromptError


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Insist on a whole number in a range; gives it as an `int`.

    Raises
    ------
    OptionError
        For a truth value, a fraction, or a number outside the range; the message gives the range.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    out = found is None or (least is not None and found < least) or (most is not None and found > most)
    if found is None or out or isinstance(value, bool):
        bounds = "" if least is None else f" from {least}" if most is None else f" from {least} to {most}"
        raise OptionError(f"{name}={value!r}: give a whole number{bounds}")
    return found


def number(name: str, value: Any, least: float | None = None, above: float | None = None) -> float:
    """Insist on a finite number; gives it as a `float`.

    Raises
    ------
    OptionError
        For NaN, an infinity, what is no number, one below `least`, or one not above `above`.
    """
    try:
        found = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or (least is not None and found < least) or (above is not None and found <= above):
        bounds = f" above {above:g}" if above is not None else "" if least is None else f" of {least:g} or more"
        raise OptionError(f"{name}={value!r}: give a finite number{bounds}")
    return found


def text(name: str, value: str) -> str:
    """Insist on a text that every tokenizer and file can take: not empty, and without half characters.

    Raises
    ------
    PromptError
        For an empty text, or one with lone surrogates.
    """
    if not value:
        raise PromptError(f"{name} is empty: give some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise PromptError(
            f"{name} has a lone surrogate, {half}, at character {error.start + 1}: give whole characters"
        ) from None
    return value
