"""The attention scores of a query in a head: linear in what the query reads, and in what the key reads.

A score is f(q, k) + c, where q and k are affine in the layer's input, and f is linear in each. So it is what the query
reads at the layer's input, weighed by k, plus biases; and just as well what the key reads there, weighed by q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.freeze import Frozen
from loclin.freeze.pattern import Pattern
from loclin.freeze.scores import ScoreRow
from loclin.network.autograd import grad
from loclin.network.link import LayerLink

Side = Literal["query", "key"]
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far a score may be from the sum of its parts, relative to their sizes."""
_SURE, _COARSE, _SINGLE = 1e-3, 0.1, 1e-6
"""How far the softmax of scores may be from the attention: in half precision a model rounds its scores before."""
_MASKED = -3e4
"""Scores that are masked are lower."""


@dataclass(frozen=True, eq=False)
class ReadSide:
    """A score as what one side reads: cotangent . x, plus constants, with x at the layer's input."""

    cotangent: Float[Tensor, "T d"]
    constants: dict[str, float]  # what each bias adds
    size: float  # the sum of the absolute values of the products in q . k

    __repr__ = brief


class AttentionScores:
    """The scores of the query at one position, in one head of a layer, for all keys.

    Cost: two forward passes of the layer. Memory: its graph.

    Raises OptionError, which names the module, for a head that does not exist, or an attention whose scores are not a
    product of a query and a key.

    Attributes
    ----------
    layer, head, query: the layer, the head's number in it, and the position.
    pattern: the attention probabilities `[T]`.
    """

    def __init__(self, link: LayerLink, head: int, query: int) -> None:
        finder = _Finder(link.call.block.sublayers.attn or "", ScoreRow(head, query))
        self.layer, self._graph = link.index, link.graph(collect=True, finder=finder)
        found, pattern, self._attention = finder.found, finder.pattern, finder.name
        if (why := link.trace.sequence.fallback_reason) is not None:
            raise OptionError(f"{link.trace.model.info.name} has no layers to tell apart: {why}")
        if found is None or pattern is None:
            raise OptionError(f"layer {link.index}: {self._attention} has no attention heads; choose another layer")
        heads = pattern.shape[0]
        if not -heads <= head < heads:
            raise OptionError(f"L{link.index}H{head}: layer {link.index} has query heads 0 to {heads - 1}")
        self.head, self.query = head % heads, query
        self.pattern: Float[Tensor, " T"] = pattern.row(self.head, query)
        if found.row is None or len(found.factors) != 1 or not all(one.requires_grad for one in found.factors[0]):
            raise self._no_product()
        self._row, (self._factors,) = found.row, found.factors
        again = self._row.detach().double().nan_to_num().softmax(0)[: len(self.pattern)]
        limit = _SURE if torch.finfo(link.trace.sequence.dtype).eps < _SINGLE else _COARSE
        if len(again) != len(self.pattern) or not (again - self.pattern.to(again)).abs().max() <= limit:
            raise self._no_product()

    @property
    def name(self) -> str:
        """The head's name, such as `L3H5`."""
        return f"L{self.layer}H{self.head}"

    def value(self, key: int) -> float:
        """The score of a key, as its softmax takes it; OptionError where the query may not attend to it."""
        score = self._row[key].item()
        if score <= _MASKED or self.pattern[key].isnan():
            raise OptionError(
                f"{self.name}: the token at {self.query} may not attend to that at {key}; give a key "
                "to which it attends"
            )
        return score

    def read(self, side: Side, key: int) -> ReadSide:
        """The score of a key as what the query, or the key, reads at the layer's input. Cost: a column of attention."""
        score, names = self._row[key], [name for name, _ in self._graph.constants]
        sources = [self._graph.points["resid_pre"], *(leaf for _, leaf in self._graph.constants)]
        beside = grad(score, sources, retain_graph=True, allow_unused=True)
        products, pulled = [], list[tuple[Tensor | None, ...]]()
        for factor in self._factors:
            (weights,) = grad(score, factor, retain_graph=True)
            products.append((weights * factor).abs().sum().item())
            pulled.append(grad(factor, sources, weights, retain_graph=True, allow_unused=True))
        own, other = pulled if side == "query" else pulled[::-1]
        cotangent = torch.zeros_like(sources[0]) if own[0] is None else own[0]
        constants: dict[str, float] = {}
        for name, leaf, mine, its, all_ways in zip(names, sources[1:], own[1:], other[1:], beside[1:], strict=True):
            given = all_ways if mine is None and its is None else mine  # what reaches it by neither is added to it
            if given is not None:
                constants[name] = constants.get(name, 0.0) + _dot(given, leaf)
        size = max(products) + sum(map(abs, constants.values()))
        missed = abs(score.item() - _dot(cotangent, sources[0]) - sum(constants.values()))
        if not missed <= _AGREEMENT[score.dtype] * (size + (cotangent * sources[0]).abs().sum().item()):
            raise self._no_product()
        return ReadSide(cotangent[0].detach(), {name: share for name, share in constants.items() if share}, size)

    def _no_product(self) -> OptionError:
        return OptionError(
            f"layer {self.layer}: the scores of {self._attention} are not the product of a query and a key that can be "
            "followed from the layer's input; choose another layer"
        )

    __repr__ = brief


class _Finder:
    """Reads a row of scores, and the attention pattern, in one frozen pass of a layer; of its last attention."""

    def __init__(self, path: str, scores: ScoreRow) -> None:
        self.pattern: Pattern | None = None
        self.found: ScoreRow | None = None
        self.name = ""
        self._path, self._scores = path, scores

    def keep(self, pattern: Pattern) -> None:
        """Take the attention pattern, and the scores that it was made of."""
        self.pattern, self.found = pattern, replace(self._scores)

    def hooks(self, mode: Frozen, layer: nn.Module, _name: str) -> Iterator[RemovableHandle]:
        """Read until the module at `path` gives the attention's output; a soft cap on scores is live until then."""
        end = layer.get_submodule(self._path)  # the layer itself, where no module gives that
        self.name = f"{self._path} ({type(end).__name__})".strip()

        def enter(_module: nn.Module, _args: object) -> None:
            mode.scores, mode.soft_caps = self._scores, True

        def leave(_module: nn.Module, _args: object, _output: object) -> None:
            mode.scores, mode.soft_caps = None, False

        yield layer.register_forward_pre_hook(enter)
        yield end.register_forward_hook(leave)


def _dot(weights: Tensor, value: Tensor) -> float:
    return (weights.double() * value.detach().double()).sum().item()
