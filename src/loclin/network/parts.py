"""One part of a layer as a map: its attention, its MLP, or a query head of its attention."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.errors import OptionError
from loclin.network.link import LayerLink, batched_jvp, batched_vjp, behind_attention, pushed_constants
from loclin.network.points import Point, parse
from loclin.network.trace import Trace
from loclin.network.units import Inside, Projection

_HEAD = re.compile(r"L(-?\d+)H(-?\d+)")


@dataclass(frozen=True)
class Part:
    """A part of a layer: `attn_out`, `mlp_out`, or one query head of its attention.

    `at` is the one position that it may write at; None for all.
    """

    kind: str
    layer: int
    head: int | None = None
    at: int | None = None

    def __str__(self) -> str:
        name = f"{self.kind}.{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"
        return name if self.at is None else f"{name}@{self.at}"

    @property
    def rank(self) -> tuple[int, bool]:
        """Where it stands along the stream."""
        return self.layer, self.kind == "mlp_out"


def parse_part(name: str, trace: Trace) -> Part:
    """Read a part's name: `L3H5`, `attn_out.3` or `mlp_out.3`, each with `@4` for what it writes at position 4 alone.

    Raises
    ------
    OptionError
        For a name of another form, or a layer that does not exist.
    PromptError
        For a position outside the prompt.
    """
    plain, _, at = name.partition("@")
    head = _HEAD.fullmatch(plain)
    if (head is None and not plain.startswith(("attn_out.", "mlp_out."))) or (at and not re.fullmatch(r"-?\d+", at)):
        raise OptionError(f"no part {name!r}: write L3H5, attn_out.3 or mlp_out.3, or L3H5@4 for one position alone")
    point = parse(f"attn_out.{head[1]}" if head else plain, trace.n_layers)
    assert point.layer is not None
    place = trace.position(int(at)) if at else None
    return Part(point.kind, point.layer, int(head[2]) if head else None, place)


class PartLink:
    """One part of a layer at its recorded input. Memory: the layer's graph, for as long as this object lives.

    Attributes
    ----------
    part
        Which part, its head counted from the front.
    behind_attention
        Whether it reads `resid_mid`, and not `resid_pre`.
    """

    def __init__(self, link: LayerLink, part: Part) -> None:
        link.trace.part(part.layer, part.kind)
        self._link, self._inside = link, (inside := Inside(link.call.block.parts))
        self._graph = link.graph(collect=True, inside=inside)
        self._output = self._graph.points[part.kind]
        self._heads: Projection | None = None
        if part.head is not None:
            found = inside.projection(part.kind, self._output, self._graph.constants)
            if found is None:
                raise OptionError(f"layer {part.layer}: {inside.why_whole(part.kind)}")
            if not -found.count <= part.head < found.count:
                raise OptionError(f"{part}: layer {part.layer} has query heads 0 to {found.count - 1}")
            self._heads, part = found, replace(part, head=part.head % found.count)
        self.part = part
        # an MLP that does not stand beside the attention reads `resid_mid`, everything else `resid_pre`
        beside = self._link.call.block.parts.attn is None or self._graph.parallel
        self.behind_attention = part.kind == "mlp_out" and not beside

    @property
    def pattern(self) -> Float[Tensor, "T T"]:
        """A head's attention probabilities, queries by keys."""
        assert self._inside.probs is not None
        assert self.part.head is not None
        return self._inside.probs[self.part.head]

    def value(self) -> Float[Tensor, "T d"]:
        """What the part adds to the stream at the prompt."""
        if self._heads is None:
            return self._at(self._link.trace.value(Point(self.part.kind, self.part.layer)))
        return self._behind(self._heads.source.detach()[None])[0]

    def vjp(self, cotangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T d"]:
        """Pull a block of cotangents back through the part. Cost: n columns of it."""
        block, source = self._at(cotangents.to(self._output))[:, None], self._source
        if self._heads is None:
            return batched_vjp(self._output, source, block)[:, 0]
        units = self._alone(batched_vjp(self._output, self._heads.source, block))
        return batched_vjp(self._heads.source, source, units)[:, 0]

    def jvp(self, tangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T d"]:
        """Push a block of tangents through the part. Cost: n columns of it."""
        block = tangents.to(self._output)[:, None]
        if self._heads is None:
            return self._at(batched_jvp(self._output, self._source)(block)[:, 0])
        return self._behind(batched_jvp(self._heads.source, self._source)(block))

    def constants(self) -> dict[str, Float[Tensor, "T d"]]:
        """What each bias inside the part adds to what it gives: for a head, those in front of its output projection."""
        constants = self._graph.constants
        if self._heads is None:
            if self.behind_attention:
                constants = [(name, leaf) for name, leaf in constants if behind_attention(self._graph, leaf)]
            return {name: self._at(added) for name, added in pushed_constants(self._output, constants).items()}
        found: dict[str, Tensor] = {}
        for name, leaf in constants:
            added = self._behind(batched_jvp(self._heads.source, leaf)(leaf.detach()[None]))[0]
            if added.any():
                found[name] = found[name] + added if name in found else added
        return found

    @property
    def _source(self) -> Tensor:
        return self._graph.source("resid_mid" if self.behind_attention else "resid_pre")

    def _alone(self, units: Tensor) -> Tensor:
        assert self._heads is not None
        assert self.part.head is not None
        return self._heads.alone(units, self.part.head)

    def _behind(self, units: Tensor) -> Float[Tensor, "n T d"]:
        """The head's own part of a block of what all heads give, behind the output projection."""
        assert self._heads is not None
        return self._at(batched_jvp(self._output, self._heads.source)(self._alone(units))[:, 0])

    def _at(self, block: Float[Tensor, "*n T d"]) -> Float[Tensor, "*n T d"]:
        """The block at the one position where the part may write."""
        if self.part.at is None:
            return block
        kept = torch.zeros_like(block)
        kept[..., self.part.at, :] = block[..., self.part.at, :]
        return kept
