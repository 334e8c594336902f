"""The maps of every layer, yielded one by one: from the embeddings to each, each layer's own, and from each to the end.

With y_l = L_l ... L_1 x, all products of the first factors are by-products of one forward sweep; products of the last
factors, of one backward sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loclin.common.arguments import strings
from loclin.common.brief import brief
from loclin.common.sums import relative_error
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.linear_map import LinearMap
from loclin.network import cost, memory
from loclin.network.autograd import batched_jvp, push_constants
from loclin.network.blocks import Workspace
from loclin.network.chain import Chain
from loclin.network.ends import NormLink
from loclin.network.memory import Allowance
from loclin.network.points import Point, Span
from loclin.network.prefix import CountColumns, prefix_maps

Mode = Literal["cumulative", "layerwise", "suffix"]
"""`cumulative`: embed -> the point; `layerwise`: the layer's input -> the point; `suffix`: the point -> final."""
Direction = Literal["forward", "backward"]
_COPIES = 3  # of one layer's maps: side by side, and the bases of their decompositions
COMPONENTS = ("attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True)
class LayerMap:
    """One component's map at one layer."""

    layer: int
    component: str
    maps: Tensor  # each token's, [T, d_out, d_in], a view that the next layer overwrites
    joint: Tensor  # side by side, [d_out, T d_in]
    value: Tensor  # y, the network's own value at the map's target [d_out]
    bias: Tensor  # b, the part of y that does not come from the map's source [d_out]
    reconstruction_error: float  # |J x + b - y| / |y|

    __repr__ = brief


def check_components(chain: Chain, components: Sequence[str] | None) -> tuple[str, ...]:
    """The components asked for, or all that every layer has; OptionError for one that a layer does not have."""
    trace = chain.trace
    if components is None:
        found = [call.block.sublayers for call in trace.layers]
        has = {"attn_out": all(s.attn for s in found), "mlp_out": all(s.mlp for s in found), "resid_post": True}
        return tuple(name for name in COMPONENTS if has[name])
    components = strings("components", components)
    if not components or not set(components) <= set(COMPONENTS):
        raise OptionError(f"components={components!r}: choose some of {', '.join(COMPONENTS)}")
    for component in components:
        for layer in range(trace.n_layers) if component != "resid_post" else ():
            trace.sublayer_path(layer, component)
    return tuple(name for name in COMPONENTS if name in components)


def plan_direction(
    chain: Chain, position: int, components: Sequence[str], budget: Allowance | memory.Budget = None
) -> Direction:
    """By counted flops: one forward sweep, if it fits the budget, or a backward one for each component and layer."""
    trace = chain.trace
    forward = cost.prefix_sweep_cost(chain, position, range(trace.length))
    embed = Point("embed")
    backward = sum(
        cost.sweep_cost(chain, embed, Point(name, layer), trace.width).flops
        for name in components
        for layer in range(trace.n_layers)
    )
    spare = memory.as_allowance(budget, trace.layers[0].hidden.device).spare
    fits = layer_bytes(chain, position, components, "forward") <= spare
    return "forward" if fits and forward.flops <= backward else "backward"


def layer_bytes(chain: Chain, position: int, components: Sequence[str], direction: str) -> int:
    """The memory of all layers' maps and their decompositions, one layer at a time, and of what biases add to each."""
    trace, size = chain.trace, chain.trace.dtype.itemsize
    one = trace.length * trace.width**2 * size
    biases = 5 * trace.n_layers * trace.length * trace.width * size
    if direction == "forward":
        forward = cost.prefix_sweep_cost(chain, position, range(trace.length))
        return forward.nbytes + (len(components) + _COPIES) * one + biases
    return (1 + _COPIES) * one + biases


@in_plain_torch
def layer_maps(
    chain: Chain,
    mode: str,
    position: int,
    components: Sequence[str],
    *,
    normed: bool = True,
    direction: str | None = None,
    budget: Allowance | memory.Budget = None,
    progress: CountColumns = lambda _columns: None,
) -> Iterator[LayerMap]:
    """The maps of every layer, component by component (paper, section 3.4 and Figure 6).

    They end at `position`, go to `components` (from `check_components`), and come from the first layer to the last; of
    `suffix` from the last to the first. `normed` puts the final norm, frozen at the point's own value, on top of maps
    that end at a layer. `direction` is that of `cumulative` sweeps, `plan_direction`'s choice unless given. OptionError
    for an unknown mode or direction.

    Cost: `cumulative` one forward sweep (`loclin.network.cost.prefix_sweep_cost`) or (L + 1) / 2 dense maps for each
    component; `layerwise` up to one dense map for each component; `suffix` one dense map. All: one column
    for the biases.
    """
    budget = memory.as_allowance(budget, chain.trace.layers[0].hidden.device)
    for name, given, known in (("mode", mode, get_args(Mode)), ("direction", direction, get_args(Direction))):
        if given not in known and given is not None:
            raise OptionError(f"{name}={given!r}: choose one of {', '.join(known)}")
    biases = push_biases(chain)
    if mode == "suffix":
        yield from _suffix(chain, position, components, biases, progress)
        return
    if mode == "layerwise":
        found = _one_by_one(chain, "resid_pre", position, components, budget, progress)
    elif (direction or plan_direction(chain, position, components, budget)) == "forward":
        found = _forward(chain, position, components, progress)
    else:
        found = _one_by_one(chain, "embed", position, components, budget, progress)
    for point, maps in found:
        layer, name = point.layer, point.kind
        assert layer is not None
        value, bias = chain.trace.value(point)[position].to(maps), biases[layer][name][position].to(maps)
        x = chain.trace.value(Point("resid_pre", layer) if mode == "layerwise" else Point("embed")).to(maps)
        if mode == "layerwise":
            bias = bias - _apply(maps, biases[layer]["resid_pre"])
        if normed:
            norm = chain.norm(point, position)
            (bias,) = norm.jvp(bias[None]).to(maps)
            bias += sum(c.to(maps) for c in norm.constants().values())
            value, maps = norm.value().to(maps), _apply_norm(norm, maps)
        yield _layer_map(point, maps, value, bias, x)


def _apply(maps: Tensor, x: Tensor) -> Tensor:
    """The sum over tokens of J_i x_i."""
    return torch.bmm(maps, x.to(maps).unsqueeze(-1)).sum(0)[:, 0]


def _layer_map(point: Point, maps: Tensor, value: Tensor, bias: Tensor, x: Tensor) -> LayerMap:
    side_by_side = maps.transpose(0, 1)
    joint = side_by_side.flatten(1) if side_by_side.is_contiguous() else maps.mT.flatten(0, 1).mT
    assert point.layer is not None
    error = relative_error(_apply(maps, x) + bias - value, value)
    return LayerMap(point.layer, point.kind, maps, joint, value, bias, error)


def _apply_norm(norm: NormLink, maps: Tensor) -> Tensor:
    """N maps, for a frozen norm N. Cost: d columns through the norm, and a product where it is not diagonal."""
    matrix = norm.jvp(torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device)).to(maps).mT
    diagonal = matrix.diagonal()
    return maps.mul_(diagonal[:, None]) if torch.equal(matrix, diagonal.diag()) else matrix @ maps


def _forward(
    chain: Chain, position: int, components: Sequence[str], progress: CountColumns
) -> Iterator[tuple[Point, Tensor]]:
    for layer, found in prefix_maps(chain, position, range(chain.trace.length), components, progress):
        for name in components:
            yield Point(name, layer), found[name].mT


def _one_by_one(
    chain: Chain,
    source: str,
    position: int,
    components: Sequence[str],
    budget: Allowance,
    progress: CountColumns,
) -> Iterator[tuple[Point, Tensor]]:
    """Each map by a backward sweep of its own, from the embeddings or from its layer's input."""
    for layer in range(chain.trace.n_layers):
        start = Point(source, None if source == "embed" else layer)
        for name in components:
            J = LinearMap(chain, start, Point(name, layer), position, budget=budget)
            yield J.target, J.dense().transpose(0, 1)
            progress(J.shape[0] * len(chain.steps(J.source, J.target)))


def _suffix(
    chain: Chain, position: int, components: Sequence[str], biases: list[dict[str, Tensor]], progress: CountColumns
) -> Iterator[LayerMap]:
    """Maps to `final`, by-products of one backward sweep.

    `attn_out` and `mlp_out` reach `final` through the residual stream, and so have the map of the stream behind them.
    """
    trace, end = chain.trace, Point("final")
    norm, last = chain.norm(end, position), biases[-1]["resid_post"][position]
    value = trace.value(end)[position]
    total = norm.jvp(last[None])[0] + sum(norm.constants().values(), start=torch.zeros_like(value))
    basis = torch.eye(len(value), dtype=trace.dtype, device=value.device)
    halves = "attn_out" in components
    layer, middle = trace.n_layers - 1, False
    chunk = chain.chunk(len(basis), len(basis))
    for pulled in chain.backward(basis, Span(Point("embed"), end, position), chunk, halves):
        progress(len(basis))
        if layer < 0:
            return
        maps = pulled.transpose(0, 1)
        before_mlp = middle and not chain.is_parallel(layer)  # the attention's output passes the MLP, unless parallel
        bias = total.to(maps) - _apply(maps, biases[layer]["resid_mid" if before_mlp else "resid_post"])
        for name in [name for name in components if (name == "attn_out") == middle]:
            point, own = Point(name, layer), bias
            x = trace.value(point).to(maps)
            if name != "resid_post":
                after = trace.stream(2 * layer + (1 if before_mlp else 2))[0]
                own = bias + _apply(maps, after.to(maps) - x)
            yield _layer_map(point, maps, value.to(maps), own, x)
        layer -= 1 if middle or not halves else 0
        middle = halves and not middle


def push_biases(chain: Chain) -> list[dict[str, Tensor]]:
    """What the biases before a point add there `[T, d]`, at every point of every layer. Cost: one column."""
    trace, workspace = chain.trace, Workspace()
    stream = torch.zeros(trace.length, trace.width, dtype=trace.dtype, device=trace.layers[0].hidden.device)
    found = []
    for index, link in enumerate(chain.layers):
        layer, at = chain.explicit_layer(index, workspace), {"resid_pre": stream}
        if layer is not None:
            attended, moved = layer.affine(stream)
            at |= {"attn_out": attended, "mlp_out": moved, "resid_mid": stream + attended.to(stream.device)}
            stream = stream + (attended + moved).to(stream.device)
        else:
            graph = link.graph(collect=True)
            for name in graph.points.keys() - {"resid_pre"}:
                push = batched_jvp(graph.points[name], graph.points["resid_pre"])
                (pushed,) = push(stream[None, None].to(link.device))
                inside = push_constants(graph.constants, graph.points[name], lambda block: block[:, 0])
                at[name] = sum(inside.values(), start=pushed[0])
            stream = at["resid_post"].to(stream.device)
        found.append(at | {"resid_post": stream})
    return found
