"""Arguments as they are given: lists of texts, whole numbers of every library, numbers that are finite."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor

from loclin.errors import OptionError


def strings(name: str, given: Any) -> list[str]:
    """A list of strings; one string alone, which Python would take for the list of its letters, is refused.

    Raises
    ------
    OptionError
        For a string, or for what is no list of strings.
    """
    if isinstance(given, str):
        raise OptionError(f"{name}={given!r} is one string where a list is meant: {name}=[{given!r}]")
    try:
        found = list(given)
    except TypeError:
        raise OptionError(f"{name}={given!r}: give a list of strings") from None
    for one in found:
        if not isinstance(one, str):
            raise OptionError(f"{name} holds {one!r}: give a list of strings")
    return found


def whole(name: str, given: Any) -> int:
    """A whole number, also NumPy's or a tensor's, as Python's own; True and False are none.

    Raises
    ------
    OptionError
        For anything else.
    """
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except TypeError:
        pass
    raise OptionError(f"{name}={given!r}: give a whole number")


def real(name: str, given: Any) -> float:
    """A finite number, also NumPy's or a tensor's, as Python's own.

    Raises
    ------
    OptionError
        For anything else.
    """
    try:
        if not isinstance(given, (bool, str)) and math.isfinite(found := float(given)):
            return found
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of what is no number, or several
        pass
    raise OptionError(f"{name}={given!r}: give a finite number")


def refuse_broken(name: str, vector: Tensor) -> None:
    """Refuse a vector with NaN or infinite numbers, of which every product would be one too.

    Raises
    ------
    OptionError
        Saying how many there are.
    """
    bad = int((~vector.isfinite()).sum()) if vector.is_floating_point() else 0
    if bad:
        raise OptionError(f"{name} has {bad} of {vector.numel()} numbers that are NaN or infinite")
