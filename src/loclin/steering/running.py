"""Sums over the tokens read so far, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Push = Callable[[Tensor, Tensor], Tensor]
"""(embeddings [n, d], their positions [n]) -> what they add [n, d]."""


class Running:
    """S_p of every column p of a batch `[B, t]`, and how many tokens each sequence has up to there.

    Padding adds nothing and has no position. Memory: B t d numbers, about that of one layer's keys.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def fits(self, batch: int, past: int) -> bool:
        """Whether it holds the first `past` columns of so many sequences."""
        return past == 0 or (self._columns >= past and len(self._sums[0]) == batch)

    @property
    def _columns(self) -> int:
        return sum(part.shape[1] for part in self._counts)

    def add(
        self, x: Float[Tensor, "B n d"], real: Bool[Tensor, "B n"], push: Push, past: int
    ) -> Float[Tensor, "B n d"]:
        """Go on behind the first `past` columns with new tokens; gives S at each of them."""
        if self._columns > past:  # generation took some back
            self._sums = [torch.cat(self._sums, 1)[:, :past]]
            self._counts = [torch.cat(self._counts, 1)[:, :past]]
        counts = real.long().cumsum(1)
        if past:
            counts = counts + self._counts[-1][:, -1:]
        added = push(x[real], counts[real] - 1)
        sums = added.new_zeros((*real.shape, added.shape[-1]))
        sums[real] = added
        if past:
            sums[:, 0] += self._sums[-1][:, -1]
        sums = sums.cumsum(1)
        self._sums.append(sums)
        self._counts.append(counts)
        return sums

    def move(self, rows: Tensor | int) -> None:
        """Take these rows, in this order; a number repeats every row so often."""

        def moved(part: Tensor) -> Tensor:
            if isinstance(rows, int):
                return part.repeat_interleave(rows, dim=0)
            return part.index_select(0, rows.to(part.device))

        self._sums = [moved(torch.cat(self._sums, 1))]
        self._counts = [moved(torch.cat(self._counts, 1))]
