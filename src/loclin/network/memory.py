"""The memory budget: how many bytes a prompt and its analyses may use beside the weights and their results."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from loclin.common.free_memory import available
from loclin.errors import BudgetError, OptionError

Budget = int | float | str | None
"""How much memory a prompt may use, as `budget` reads it."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DIGITS = 30
_DEFAULT_FRACTION = 0.25
_DEFAULT_MOST = 4 * 2**30
PATTERNS = 11
"""How often a layer's graph has attention probabilities and scores, at most."""


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


@dataclass(frozen=True)
class Allowance:
    """How the budget of one prompt is spent.

    Beside what the prompt cannot do without, a quarter is for coefficients, an eighth for attention patterns that are
    held whole, and the rest, to spare, for more columns at a time, for dense maps and for their decompositions.
    """

    total: int
    kept: int  # by the prompt's values at every layer, for as long as it lives
    work: int  # in the widest moment of one layer, with one column

    @property
    def _more(self) -> int:
        return max(0, self.total - self.kept - self.work)

    @property
    def coefficients(self) -> int:
        """The bytes of coefficients that are kept; others are computed again."""
        return self._more // 4

    @property
    def pattern(self) -> int:
        """The bytes up to which a layer's attention probabilities are held whole."""
        return self._more // 8 // PATTERNS

    @property
    def spare(self) -> int:
        """The bytes to spare."""
        return _spare(self._more)

    def least(self, extra: int = 0) -> int:
        """The least total with so many bytes to spare."""
        more = max(0, 8 * extra // 5 - 4)
        while _spare(more) < extra:
            more += 1
        return self.kept + self.work + more

    def require(self, what: str, extra: int = 0) -> None:
        """Refuse what needs more, by a BudgetError that names the least budget that works."""
        least = self.least(extra)
        if self.total < least:
            parts = f"{self.kept / 1e6:.1f} MB for its values at every layer, {self.work / 1e6:.1f} MB for one layer"
            more = least - self.kept - self.work
            maps = f", {more / 1e6:.1f} MB for maps and coefficients" if more else ""
            raise BudgetError(
                f"memory={self.total} is too small for {what}: it takes at least {least / 1e6:.1f} MB ({parts}{maps}); "
                f"give memory={least}, or fewer tokens",
                least,
            )


def _spare(more: int) -> int:
    return more - more // 4 - more // 8


def as_allowance(given: Allowance | Budget, device: torch.device) -> Allowance:
    """An allowance as it is; any other budget is for columns and maps alone."""
    return given if isinstance(given, Allowance) else Allowance(budget(given, device), 0, 0)


def allowance(given: Budget, device: torch.device, kept: int, work: int) -> Allowance:
    """The allowance of a prompt; a default budget is beside what the prompt cannot do without, if that is free."""
    total = budget(given, device)
    if given is None:
        total = min(total + kept + work, max(total, available(device)))
    found = Allowance(total, kept, work)
    found.require("this prompt")
    return found
