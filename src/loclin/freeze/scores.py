"""One row of attention scores, of a query in one head: what a softmax takes, read while a model attends.

A score is q . k, times a scale, plus what a mask or a position adds. Where it is read, both factors stay live, and each
is a node of the graph: the derivative by one of them holds the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loclin.common.brief import brief


@dataclass
class ScoreRow:
    """The scores of one query in one head on the linear path; of the last attention, if there are several.

    Attributes
    ----------
    head, query: which row is read.
    row: the scores `[S]` of all keys, with the graph; very low, or -inf, where the query may not attend. None: nothing
        attended, or there is no such head.
    factors: the pairs of live factors of the products that make them, queries first.
    """

    head: int
    query: int
    row: Tensor | None = None
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _products: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    __repr__ = brief

    def note(self, query: Tensor, key: Tensor) -> None:
        """Note the live factors of a product."""
        self._products.append((query, key))

    def take(self, scores: Tensor) -> None:
        """Take the row from all scores `[..., H, T, S]` that a softmax is given."""
        self.factors, self._products = self._products, []
        by_head = scores.flatten(0, -3)
        if -len(by_head) <= self.head < len(by_head):
            self.row = by_head[self.head, self.query]
