"""Maps through named components only, J_path = R C_m ... C_1: one head, or a path of heads, attentions and MLPs.

Only the residual stream passes between components, and R is as for `loclin.network.chain`. The maps of all paths sum to
the whole map, since the stream is a sum and every component is linear.
"""
# ruff: noqa: ARG002 (a path's sweeps have the arguments of a chain's)

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
from loclin.network.components import Component, ComponentLink
from loclin.network.memory import Allowance
from loclin.network.points import KINDS, Point, Span
from loclin.results.provenance import Provenance
from loclin.results.sweep_file import SweepFile


class PathChain(Chain):
    """Sweeps through some components in order, with nothing but the stream between them."""

    def __init__(self, chain: Chain, components: Sequence[Component]) -> None:
        super().__init__(chain.trace, chain.options, explicit=False)
        self.links = [ComponentLink(self.layers[component.layer], component) for component in components]
        for before, after in pairwise(self.links):
            beside = before.component.layer == after.component.layer and not after.behind_attention
            if before.component.rank >= after.component.rank or beside:
                raise OptionError(
                    f"{after.component} does not read what {before.component} writes: a path goes up, from lower "
                    "layers to higher ones"
                )

    def __str__(self) -> str:
        return " > ".join(str(link.component) for link in self.links)

    def steps(self, source: Point, target: Point, halves: bool = False) -> list[tuple[int, str, str]]:
        """A step for each component."""
        return [(link.component.layer, "resid_pre", "resid_post") for link in self.links]

    def backward(
        self,
        cotangents: Float[Tensor, "n d_out"],
        span: Span,
        chunk: int | None = None,
        halves: bool = False,
        kept: SweepFile | None = None,
    ) -> Iterator[Float[Tensor, "n T d"]]:
        """As for `Chain`, but no state is `kept`. Cost: n columns of each component."""
        at_position = self.readout(span.target, span.position, span.normed).vjp(cotangents)
        block = at_position.new_zeros(len(at_position), self.trace.length, self.trace.width)
        block[:, span.position] = at_position
        yield block
        yield from self.pull_stream(block, chunk)

    def pull_stream(self, block: Float[Tensor, "n T d"], chunk: int | None = None) -> Iterator[Float[Tensor, "n T d"]]:
        """Pull cotangents at the end of the stream back through the components, the last one first."""
        for link in reversed(self.links):
            block = _apply_in_chunks(link.vjp, block, chunk)
            yield block

    def forward(self, tangents: Float[Tensor, "n T d"], span: Span, chunk: int | None = None) -> Iterator[Tensor]:
        """As for `Chain`. Cost: n columns of each component."""
        pushed = tangents
        for link in self.links:
            pushed = _apply_in_chunks(link.jvp, pushed, chunk)
            yield pushed
        yield self.readout(span.target, span.position, span.normed).jvp(pushed[:, span.position])

    def constants(self, span: Span, by_source: bool = False) -> dict[str, Float[Tensor, " d_out"]]:
        """What the biases inside the first component add by this path; those of the others begin paths of their own."""
        (first, *others), found = self.links, {}
        readout = self.readout(span.target, span.position, span.normed)
        for name, added in first.constants().items():
            block = added[None]
            for link in others:
                block = link.jvp(block)
            found[name] = readout.jvp(block[:, span.position])[0]
        return found if by_source else {"sum": self.total(found, span.target, span.normed)}


class PathMap(LinearMap):
    """The map by way of some components only; made by `Linearization.path` and `Linearization.head`.

    It differs from a `LinearMap` in two points: its `value` is what the components make of the source, and its `bias`
    what their biases add.
    """

    chain: PathChain

    def __repr__(self) -> str:
        return f"PathMap({self.source} -> {self.chain} -> {self.target} at {self.position}, {self.shape})"

    @property
    def value(self) -> Float[Tensor, " d_out"]:
        """What the path gives at the target: for one component, what it writes there; else J x + b."""
        is_one_component = self.source.kind != "embed" and self.target.kind in KINDS
        return self.chain.links[0].value()[self.position].to(self.device) if is_one_component else self.reconstruct()

    def provenance(self) -> Provenance:
        """Which map this is; its target names the components."""
        return replace(super().provenance(), target=f"{self.target} by {self.chain}")


def _apply_in_chunks(product: Callable[[Tensor], Tensor], block: Tensor, chunk: int | None) -> Tensor:
    parts = [product(part).to(block) for part in block.split(chunk or max(1, len(block)))]
    return torch.cat(parts) if parts else block


def component_map(chain: Chain, component: Component, position: int, budget: Allowance | None) -> PathMap:
    """One component's map, from what enters it to what it writes at a position."""
    path = PathChain(chain, [component])
    source = "resid_mid" if path.links[0].behind_attention else "resid_pre"
    target = Point(component.kind, component.layer)
    return PathMap(path, Point(source, component.layer), target, position, budget=budget)


def path_map(
    chain: Chain, components: Sequence[Component], target: Point, position: int, budget: Allowance | None
) -> PathMap:
    """A path's map, from the embeddings to a target; OptionError if it is empty, or goes down."""
    if not components:
        raise OptionError("a path has no component: give at least one, such as ['L3H5', 'L10H2']")
    return PathMap(PathChain(chain, components), Point("embed"), target, position, budget=budget)
