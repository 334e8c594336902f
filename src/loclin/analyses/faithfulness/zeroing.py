"""Disrupt and recover: what becomes of a probability as the embeddings of tokens are set to zero (2603.19742)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.nearby import Nearby

_STEPS = tuple(step / 10 for step in range(1, 11))
_LONG_STEPS = tuple(1 / (1 + math.exp(-(-6 + 1.2 * step))) for step in range(11))
_LONG = 64
"""Above so many tokens the steps crowd at both ends, as the protocol has them for long contexts."""


class Zeroing:
    """The probability of one token after a prompt with the embeddings of some of its tokens set to zero.

    The model is otherwise untouched: positions, masks and all other tokens stay. A set that was run is not run again.
    """

    def __init__(self, nearby: Nearby, embeddings: Float[Tensor, "T d"], target: int, positions: Sequence[int]) -> None:
        self._nearby, self._embeddings, self._target = nearby, embeddings, target
        self._positions = list(positions)
        self._known: dict[frozenset[int], float] = {}
        self.steps = _STEPS if len(positions) <= _LONG else _LONG_STEPS

    def probabilities(self, gone: Sequence[frozenset[int]]) -> list[float]:
        """The target's probability for each set of zeroed positions. Cost: a forward pass for each new set."""
        new = [one for one in dict.fromkeys(gone) if one not in self._known]
        if new:
            inputs = self._embeddings.repeat(len(new), 1, 1)
            for row, zeroed in enumerate(new):
                inputs[row, sorted(zeroed)] = 0
            values = self._nearby.embeddings(inputs).log_probabilities[:, self._target].exp().tolist()
            self._known |= dict(zip(new, values, strict=True))
        return [self._known[one] for one in gone]

    def areas(self, scores: Sequence[float]) -> tuple[float, float]:
        """(disrupt, recover): the mean fall of the probability in percent, as the top p go, and as all but them go.

        The higher the first and the lower the second, the better the scores; ties go to the earlier token.
        """
        disrupted, recovered = self._sets(scores)
        (whole,) = self.probabilities([frozenset()])
        first, second = (
            math.fsum(100 * (whole - p) / whole for p in self.probabilities(sets)) / len(sets)
            for sets in (disrupted, recovered)
        )
        return first, second

    def prepare(self, every: Iterable[Sequence[float]]) -> None:
        """Run all that the areas of several methods need, in few passes."""
        self.probabilities([frozenset(), *(one for scores in every for sets in self._sets(scores) for one in sets)])

    def each(self) -> Float[Tensor, " T"]:
        """How far the probability falls if one token is zeroed, for each position of the context; else 0."""
        whole, *found = self.probabilities([frozenset(), *(frozenset([i]) for i in self._positions)])
        falls = torch.zeros(len(self._embeddings), dtype=torch.float64)
        falls[self._positions] = whole - torch.tensor(found, dtype=torch.float64)
        return falls

    def _sets(self, scores: Sequence[float]) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
        order = sorted(self._positions, key=lambda i: -scores[i])
        tops = [math.ceil(step * len(order)) for step in self.steps]
        return [frozenset(order[:n]) for n in tops], [frozenset(order[n:]) for n in tops]
