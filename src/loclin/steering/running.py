"""Running sums over the tokens read so far, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Push = Callable[[Tensor, Tensor], Tensor]
"""A function from embeddings [n, d] and their positions [n] to what they add [n, d]."""


class RunningSums:
    """S_p at every column p of a batch `[B, t]`, and how many tokens of each sequence are up to p: B t d numbers."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    @property
    def _columns(self) -> int:
        return sum(part.shape[1] for part in self._counts)

    def fits(self, batch: int, past: int) -> bool:
        """Tell whether it holds the first `past` columns of `batch` sequences."""
        return past == 0 or (self._columns >= past and len(self._sums[0]) == batch)

    def add(
        self, x: Float[Tensor, "B n d"], real: Bool[Tensor, "B n"], push: Push, past: int
    ) -> Float[Tensor, "B n d"]:
        """Add n new tokens after the first `past` columns, and return S at each of them."""
        if self._columns > past:  # generation has cropped the cache
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
        """Select these rows, in this order; an int repeats every row that often."""

        def reorder(part: Tensor) -> Tensor:
            if isinstance(rows, int):
                return part.repeat_interleave(rows, dim=0)
            return part.index_select(0, rows.to(part.device))

        self._sums = [reorder(torch.cat(self._sums, 1))]
        self._counts = [reorder(torch.cat(self._counts, 1))]
