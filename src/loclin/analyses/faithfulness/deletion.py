"""What happens to a prediction when tokens go: one at a time, and in an order, on the untouched model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loclin.analyses.nearby import Nearby


class Removal:
    """The log-probability of one token after a prompt with some of its tokens removed.

    Those removed are dropped from the sequence; the others move up. What has been run once is remembered, and shorter
    prompts of one length run together.
    """

    def __init__(self, nearby: Nearby, input_ids: Int[Tensor, "1 T"], target: int) -> None:
        self._nearby, self._ids, self._target = nearby, input_ids[0], target
        self._known: dict[tuple[int, ...], float] = {}

    def log_probabilities(self, kept: Sequence[tuple[int, ...]]) -> list[float]:
        """One for each set of positions that are kept, in order. Cost: a forward pass for each that is new."""
        new: dict[int, list[tuple[int, ...]]] = {}
        for positions in dict.fromkeys(kept):
            if positions not in self._known:
                new.setdefault(len(positions), []).append(positions)
        for sets in new.values():
            ids = self._ids[torch.tensor(sets, device=self._ids.device)]
            values = self._nearby.tokens(ids).log_probabilities[:, self._target].tolist()
            self._known |= dict(zip(sets, values, strict=True))
        return [self._known[positions] for positions in kept]

    def single(self) -> Float[Tensor, " T"]:
        """How far the log-probability falls when one token is removed, for each; 0 where it is the only one."""
        every = tuple(range(len(self._ids)))
        if len(every) == 1:
            return torch.zeros(1, dtype=torch.float64)
        whole, *without = self.log_probabilities([every, *(_without(every, {i}) for i in every)])
        return whole - torch.tensor(without, dtype=torch.float64)

    def curve(self, order: Sequence[int]) -> list[float]:
        """How far it falls when the first k of `order` are removed, for k = 1 … len(order), as long as one is left."""
        every, sets = _steps(len(self._ids), order)
        whole, *fallen = self.log_probabilities([every, *sets])
        return [whole - value for value in fallen]

    def prepare(self, orders: Iterable[Sequence[int]]) -> None:
        """Run all that the curves of several orders need, in as few passes as there are lengths."""
        self.log_probabilities([kept for order in orders for kept in _steps(len(self._ids), order)[1]])


def _steps(length: int, order: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """All positions, and what is kept at each step of an order."""
    every = tuple(range(length))
    return every, [_without(every, set(order[:k])) for k in range(1, min(len(order), length - 1) + 1)]


def _without(every: tuple[int, ...], gone: set[int]) -> tuple[int, ...]:
    return tuple(i for i in every if i not in gone)


def replaced(
    nearby: Nearby, embeddings: Float[Tensor, "T d"], target: int, neutral: Float[Tensor, " d"]
) -> Float[Tensor, " T"]:
    """How far a token's log-probability falls when one input embedding becomes a neutral one, for each.

    Cost: T + 1 forward passes.
    """
    length = len(embeddings)
    inputs = embeddings.repeat(length + 1, 1, 1)
    inputs[range(1, length + 1), range(length)] = neutral
    whole, *others = nearby.embeddings(inputs).log_probabilities[:, target].tolist()
    return whole - torch.tensor(others, dtype=torch.float64)


def ranked(scores: Sequence[float], positions: Sequence[int]) -> list[int]:
    """Positions by score, the highest first."""
    return sorted(positions, key=lambda i: -scores[i])
