"""The memory budget: how many bytes a sweep may use beside its result."""

from __future__ import annotations

import re

import torch

from loclin.common.free_memory import available
from loclin.errors import OptionError

Budget = int | float | str | None
"""How much memory a sweep may use, as `budget` reads it."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DIGITS = 30
_DEFAULT_FRACTION = 0.25
_DEFAULT_MOST = 4 * 2**30
_ATTENTION_PART = 32


def parse_memory(memory: int | float | str) -> int | float:
    """Read a budget: bytes as an integer, or a fraction of what is free as a float; OptionError for anything else."""
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", memory.lower())
        if not found or found[2] not in _UNITS or len(found[1]) > _DIGITS:
            raise OptionError(f"memory={memory!r}: give a number of bytes, or a size such as 2GB or 512MiB")
        number = float(found[1])
        memory = number if found[2] == "" and "." in found[1] else int(number * _UNITS[found[2]])
    if isinstance(memory, bool) or not memory > 0 or (isinstance(memory, float) and memory > 1):
        raise OptionError(
            f"memory={memory!r}: give a whole number of bytes, or a fraction of the free memory up to 1.0"
        )
    return memory


def budget(memory: Budget, device: torch.device) -> int:
    """Convert a budget for a device to bytes: a number, a size (`"2GB"`, `"512 MiB"`), or a fraction of what is free.

    None is a quarter of what is free, 4 GiB at most: wider blocks of columns are no faster.
    """
    if memory is None:
        return min(int(available(device) * _DEFAULT_FRACTION), _DEFAULT_MOST)
    size = parse_memory(memory)
    return size if isinstance(size, int) else int(available(device) * size)


def attention_bytes(size: int) -> int:
    """The bytes up to which a layer's attention probabilities are held whole, of a budget of so many.

    A part of it: while they are used, there are about four of them, and the sweep needs most of the budget.
    """
    return size // _ATTENTION_PART
