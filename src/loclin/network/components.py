"""One component of a layer as a linear map: its attention, its MLP, or a query head of its attention."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.errors import OptionError
from loclin.network.autograd import batched_jvp, batched_vjp, push_constants
from loclin.network.link import LayerLink
from loclin.network.points import Point, parse_point
from loclin.network.trace import Trace
from loclin.network.units import OutputProjection, UnitFinder

_HEAD = re.compile(r"L(-?\d+)H(-?\d+)")


@dataclass(frozen=True)
class Component:
    """A component of a layer: `attn_out`, `mlp_out`, or one query head of its attention."""

    kind: str
    layer: int
    head: int | None = None
    at: int | None = None  # the one position at which it may write

    def __str__(self) -> str:
        name = f"{self.kind}.{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"
        return name if self.at is None else f"{name}@{self.at}"

    @property
    def rank(self) -> tuple[int, bool]:
        """Its place along the stream."""
        return self.layer, self.kind == "mlp_out"


def parse_component(name: str, trace: Trace) -> Component:
    """Read a component's name: `L3H5`, `attn_out.3` or `mlp_out.3`; with `@4`, only what it writes at position 4.

    OptionError for another form or a layer that does not exist; PromptError for a position outside the prompt.
    """
    plain, _, at = name.partition("@")
    head = _HEAD.fullmatch(plain)
    if (head is None and not plain.startswith(("attn_out.", "mlp_out."))) or (at and not re.fullmatch(r"-?\d+", at)):
        raise OptionError(f"no component {name!r}: write L3H5, attn_out.3 or mlp_out.3, or L3H5@4 for one position")
    point = parse_point(f"attn_out.{head[1]}" if head else plain, trace.n_layers)
    assert point.layer is not None
    position = trace.position(int(at)) if at else None
    return Component(point.kind, point.layer, int(head[2]) if head else None, position)


class ComponentLink:
    """One component of a layer, with its graph; `behind_attention` if it reads `resid_mid`, and not `resid_pre`."""

    def __init__(self, link: LayerLink, component: Component) -> None:
        link.trace.sublayer_path(component.layer, component.kind)
        sublayers = link.call.block.sublayers
        self._link, self._finder = link, UnitFinder(sublayers)
        self._graph = link.graph(collect=True, finder=self._finder)
        self._output = self._graph.points[component.kind]
        self._heads: OutputProjection | None = None
        if component.head is not None:
            found = self._finder.projection(component.kind, self._output, self._graph.constants)
            if found is None:
                raise OptionError(f"layer {component.layer}: {self._finder.why_no_projection(component.kind)}")
            if not -found.count <= component.head < found.count:
                raise OptionError(f"{component}: layer {component.layer} has query heads 0 to {found.count - 1}")
            self._heads, component = found, replace(component, head=component.head % found.count)
        self.component = component
        # Only an MLP that is not parallel to the attention reads `resid_mid`.
        parallel = sublayers.attn is None or self._graph.parallel
        self.behind_attention = component.kind == "mlp_out" and not parallel
        self._source_kind = "resid_mid" if self.behind_attention else "resid_pre"
        self._source = self._graph.source(self._source_kind)

    def attention(self, position: int) -> Float[Tensor, " T"]:
        """A head's attention probabilities at one position."""
        assert self._finder.pattern is not None
        assert self.component.head is not None
        return self._finder.pattern.row(self.component.head, position)

    def value(self) -> Float[Tensor, "T d"]:
        """What the component adds to the stream at the prompt."""
        if self._heads is None:
            return self._only_position(self._link.trace.value(Point(self.component.kind, self.component.layer)))
        return self._write(self._heads.source.detach()[None])[0]

    def vjp(self, cotangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T d"]:
        """Pull a block of cotangents back through the component. Cost: n columns of it."""
        block = self._only_position(cotangents.to(self._output))[:, None]
        if self._heads is None:
            return batched_vjp(self._output, self._source, block)[:, 0]
        units = self._only_head(batched_vjp(self._output, self._heads.source, block))
        return batched_vjp(self._heads.source, self._source, units)[:, 0]

    def jvp(self, tangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T d"]:
        """Push a block of tangents through the component. Cost: n columns of it."""
        block = tangents.to(self._output)[:, None]
        if self._heads is None:
            return self._only_position(batched_jvp(self._output, self._source)(block)[:, 0])
        return self._write(batched_jvp(self._heads.source, self._source)(block))

    def constants(self) -> dict[str, Float[Tensor, "T d"]]:
        """What each bias inside the component adds to its output; for a head, those before its output projection."""
        if self._heads is not None:
            return push_constants(self._graph.constants, self._heads.source, self._write)
        constants = self._graph.constants_from(self._source_kind)
        return push_constants(constants, self._output, lambda block: self._only_position(block[:, 0]))

    def _only_head(self, units: Tensor) -> Tensor:
        """A block of what enters the output projection, with all other heads put to zero."""
        assert self._heads is not None
        assert self.component.head is not None
        return self._heads.isolate(units, self.component.head)

    def _write(self, units: Tensor) -> Float[Tensor, "n T d"]:
        """What the head's own share of a block of all heads' outputs becomes behind the output projection."""
        assert self._heads is not None
        return self._only_position(batched_jvp(self._output, self._heads.source)(self._only_head(units))[:, 0])

    def _only_position(self, block: Float[Tensor, "*n T d"]) -> Float[Tensor, "*n T d"]:
        """The block with zeros where the component may not write."""
        if self.component.at is None:
            return block
        kept = torch.zeros_like(block)
        kept[..., self.component.at, :] = block[..., self.component.at, :]
        return kept
