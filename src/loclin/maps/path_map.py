"""Maps through named parts only: one head, or a path of heads, attentions and MLPs as a product of their maps.

Between the parts of a path nothing but the residual stream carries on, so the map of a path is the product of theirs.
The maps of all paths sum to the whole map: the stream is a sum, and every part is linear.
"""
# ruff: noqa: ARG002 (a path's sweeps are called as a chain's are)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.errors import OptionError
from loclin.maps.linear_map import LinearMap
from loclin.network.chain import Chain
from loclin.network.link import HeadLink
from loclin.network.parts import Part, PartLink
from loclin.network.points import KINDS, Point
from loclin.results.result import Provenance


class PathChain(Chain):
    """Sweeps through some parts alone, in their order, with nothing but the stream between them."""

    def __init__(self, chain: Chain, parts: Sequence[Part]) -> None:
        super().__init__(chain.trace, chain.hold, explicit=False)
        self.parts = [PartLink(self.layers[part.layer], part) for part in parts]
        for before, after in pairwise(self.parts):
            beside = before.part.layer == after.part.layer and not after.behind_attention
            if before.part.rank >= after.part.rank or beside:
                raise OptionError(f"a path goes up: {after.part} does not read what {before.part} writes")

    def __str__(self) -> str:
        return " > ".join(str(link.part) for link in self.parts)

    def steps(self, source: Point, target: Point, halves: bool = False) -> list[tuple[int, str, str]]:
        """A step for each part."""
        return [(link.part.layer, "resid_pre", "resid_post") for link in self.parts]

    def backward(
        self,
        cotangents: Float[Tensor, "n d_out"],
        source: Point,
        target: Point,
        position: int,
        normed: bool = False,
        chunk: int | None = None,
        halves: bool = False,
    ) -> Iterator[Float[Tensor, "n T d"]]:
        """As for `Chain`. Cost: n columns of each part."""
        if target.kind == "logits":
            cotangents = HeadLink(self.trace, position).vjp(cotangents)
        if target.kind in ("final", "logits") or normed:
            cotangents = self.norm(target, position).vjp(cotangents)
        block = cotangents.new_zeros(len(cotangents), self.trace.length, self.trace.width)
        block[:, position] = cotangents
        yield block
        yield from self.through(block, chunk)

    def through(self, block: Float[Tensor, "n T d"], chunk: int | None = None) -> Iterator[Float[Tensor, "n T d"]]:
        """Pull cotangents at the end of the stream back through the parts, the last part first."""
        for link in reversed(self.parts):
            block = _chunked(link.vjp, block, chunk)
            yield block

    def forward(
        self,
        tangents: Float[Tensor, "n T d"],
        source: Point,
        target: Point,
        position: int,
        normed: bool = False,
        chunk: int | None = None,
    ) -> Iterator[Tensor]:
        """As for `Chain`. Cost: n columns of each part."""
        pushed = tangents
        for link in self.parts:
            pushed = _chunked(link.jvp, pushed, chunk)
            yield pushed
        yield self._leave(pushed[:, position], target, position, normed)

    def constants(
        self, source: Point, target: Point, position: int, normed: bool = False, by_source: bool = False
    ) -> dict[str, Float[Tensor, " d_out"]]:
        """What the biases inside the first part give by this path; those of the others begin paths of their own."""
        first, *others = self.parts
        found = {}
        for name, added in first.constants().items():
            block = added[None]
            for link in others:
                block = link.jvp(block)
            found[name] = self._leave(block[:, position], target, position, normed)[0]
        if by_source:
            return found
        zero = torch.zeros(
            self.width(target, normed), dtype=self.trace.dtype, device=self.trace.layers[0].hidden.device
        )
        return {"sum": sum((added.to(zero.device) for added in found.values()), start=zero)}


class PathMap(LinearMap):
    """The map by way of some parts alone; made by `Linearization.path` and `Linearization.head`.

    A `LinearMap` in all but this: its `value` is what the parts make of the source, and `bias` what their biases do.
    """

    chain: PathChain

    def __repr__(self) -> str:
        """Name the points, the parts and the shape."""
        return f"PathMap({self.source} -> {self.chain} -> {self.target} at {self.position}, {self.shape})"

    @property
    def value(self) -> Float[Tensor, " d_out"]:
        """What the path gives at the target: for one part, what it writes there; else J x + b."""
        whole = self.source.kind != "embed" and self.target.kind in KINDS
        return self.chain.parts[0].value()[self.position].to(self.device) if whole else self.reconstruct()

    def provenance(self) -> Provenance:
        """Which map this is; its target says by way of what."""
        return replace(super().provenance(), target=f"{self.target} by {self.chain}")


def _chunked(product: Callable[[Tensor], Tensor], block: Tensor, chunk: int | None) -> Tensor:
    parts = [product(part).to(block) for part in block.split(chunk or max(1, len(block)))]
    return torch.cat(parts) if parts else block


def part_map(chain: Chain, part: Part, position: int, budget: int | float | str | None) -> PathMap:
    """One part's map, from what enters it to what it writes at a position."""
    path = PathChain(chain, [part])
    source = "resid_mid" if path.parts[0].behind_attention else "resid_pre"
    target = Point(part.kind, part.layer)
    return PathMap(path, Point(source, part.layer), target, position, budget=budget)


def path_map(
    chain: Chain, parts: Sequence[Part], target: Point, position: int, budget: int | float | str | None
) -> PathMap:
    """A path's map, from the embeddings through its parts alone to a target on the stream or behind it."""
    if not parts:
        raise OptionError("a path has at least one part: ['L3H5', 'L10H2']")
    return PathMap(PathChain(chain, parts), Point("embed"), target, position, budget=budget)
