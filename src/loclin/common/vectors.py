"""Checks of vectors before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loclin.common.sums import refuse_non_finite
from loclin.common.surroundings import usable
from loclin.errors import OptionError


def is_block(given: Any, dims: int) -> bool:
    """Whether something has this many dimensions, so that it is several vectors and not one."""
    try:
        return np.ndim(given) == dims
    except ValueError:  # lists of different lengths
        return False


def vectors(name: str, given: Any, **sides: int | None) -> Tensor:
    """Read real numbers from an argument: a tensor, an array or lists. `sides` are its lengths by name, None for any.

    Raises OptionError for another shape, for complex numbers, and for numbers that are NaN or infinite.
    """
    shape = ", ".join(side if length is None else f"{side} = {length}" for side, length in sides.items())
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"{name} is {type(given).__name__}: give a tensor or an array [{shape}]") from None
    wanted, shown = sides.values(), found.shape
    if len(wanted) != len(shown) or any(one not in (None, side) for one, side in zip(wanted, shown, strict=True)):
        raise OptionError(f"{name} has the shape {list(found.shape)}: give [{shape}]")
    if found.is_complex() or found.is_meta or found.layout != torch.strided:
        raise OptionError(f"{name} is complex, sparse, or without numbers: give a dense tensor of real numbers")
    refuse_non_finite(name, found)
    return usable(found)
