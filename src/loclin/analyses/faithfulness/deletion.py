"""The effect of removing tokens on a prediction of the unmodified model: one at a time, and one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loclin.analyses.nearby import Nearby


class Removal:
    """The log-probability of one token after a prompt with some of its tokens removed.

    Removed tokens are dropped, so that later ones move to earlier positions. Prompts of equal length are one batch.
    """

    def __init__(self, nearby: Nearby, input_ids: Int[Tensor, "1 T"], target: int) -> None:
        self._nearby, self._ids, self._target = nearby, input_ids[0], target
        self._known: dict[tuple[int, ...], float] = {}

    def log_probabilities(self, kept: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the log-probability for each set of kept positions. Cost: one forward pass for each new set."""
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
        """Measure how far the log-probability falls if one token is removed, for each token; 0 for a single token."""
        every = tuple(range(len(self._ids)))
        if len(every) == 1:
            return torch.zeros(1, dtype=torch.float64)
        whole, *without = self.log_probabilities([every, *(_drop(every, {i}) for i in every)])
        return whole - torch.tensor(without, dtype=torch.float64)

    def curve(self, order: Sequence[int]) -> list[float]:
        """Measure how far it falls if the first k tokens of `order` are removed, for each k that leaves a token."""
        every, sets = _list_steps(len(self._ids), order)
        whole, *fallen = self.log_probabilities([every, *sets])
        return [whole - value for value in fallen]

    def prepare(self, orders: Iterable[Sequence[int]]) -> None:
        """Run all prompts that the curves of several orders need, batched by length."""
        self.log_probabilities([kept for order in orders for kept in _list_steps(len(self._ids), order)[1]])


def _list_steps(length: int, order: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """List all positions, and the positions that are kept at each step of an order."""
    every = tuple(range(length))
    return every, [_drop(every, set(order[:k])) for k in range(1, min(len(order), length - 1) + 1)]


def _drop(every: tuple[int, ...], gone: set[int]) -> tuple[int, ...]:
    return tuple(i for i in every if i not in gone)


def replace_each(
    nearby: Nearby, embeddings: Float[Tensor, "T d"], target: int, neutral: Float[Tensor, " d"]
) -> Float[Tensor, " T"]:
    """Measure its fall if one input embedding is replaced by a neutral one, for each. Cost: T + 1 forward passes."""
    length = len(embeddings)
    inputs = embeddings.repeat(length + 1, 1, 1)
    inputs[range(1, length + 1), range(length)] = neutral
    whole, *others = nearby.embeddings(inputs).log_probabilities[:, target].tolist()
    return whole - torch.tensor(others, dtype=torch.float64)


def rank_positions(scores: Sequence[float], positions: Sequence[int]) -> list[int]:
    """Sort positions by score, highest first."""
    return sorted(positions, key=lambda i: -scores[i])
