"""Every prefix map, from one token's embedding to a point of a layer, from one forward sweep J_i(l) = L_l J_i(l - 1).

Tangents of token i before position i are zero and not computed. Layers with explicit products form each position's MLP
once for all tokens; other layers push each token's columns through their own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.network.autograd import batched_jvp
from loclin.network.blocks import CausalBlock, Probe, Workspace
from loclin.network.chain import Chain
from loclin.network.link import LayerLink

CountColumns = Callable[[int], None]
"""Called with the number of columns that have passed a layer."""
Maps = dict[str, Float[Tensor, "n d_in d"]]
"""By component, the transpose of the map of each of n tokens."""


def prefix_maps(
    chain: Chain,
    position: int,
    tokens: range,
    components: Sequence[str] = ("resid_post",),
    progress: CountColumns = lambda _columns: None,
) -> Iterator[tuple[int, Maps]]:
    """The maps of some tokens to `attn_out`, `mlp_out` or `resid_post` of every layer at one position.

    With causal attention the maps of tokens behind `position` are zero and cost nothing. Yields each layer and its
    maps, which the next layer overwrites; OptionError where a layer has no module whose output is a component.

    Cost: `loclin.network.cost.prefix_sweep_cost`. Memory: d^2 numbers for each token and each position behind it for
    the tangents (on an accelerator for each token and position), d^2 for each component and token, and a layer's own.
    """
    trace, d = chain.trace, chain.trace.width
    device, stop = trace.layers[0].hidden.device, position + 1 if trace.causal else trace.length
    for component in components:
        if component != "resid_post":
            for layer in range(trace.n_layers):
                trace.sublayer_path(layer, component)
    blocks, sources = [], [token for token in tokens if token < stop]
    # One position's tangents lie together, so that they go through its matrix in one product.
    stream = torch.empty(stop, len(sources), d, d, dtype=trace.dtype, device=device)
    for number, token in enumerate(sources):
        start = token if trace.causal else 0
        block = stream[start:, number].zero_()
        block[token - start].fill_diagonal_(1)
        blocks.append(CausalBlock(start, block))
    found = {name: torch.zeros(len(tokens), d, d, dtype=trace.dtype, device=device) for name in components}
    workspace = Workspace()

    def record(index: int, name: str, columns: slice, pushed: Tensor) -> None:
        if name in found:
            found[name][index, columns] = pushed.to(device)

    for layer in range(trace.n_layers):
        is_last = layer == trace.n_layers - 1
        wanted = slice(position, position + 1) if is_last else slice(0, stop)
        explicit = chain.explicit_layer(layer, workspace)
        if explicit is not None:
            explicit.jvp(blocks, wanted, chain.chunk(d, d), probe=Probe(position, record))
        else:
            _push_through_graph(chain, layer, blocks, Probe(position, record))
        if "resid_post" in found:
            for own, (start, block) in zip(found["resid_post"], blocks, strict=False):  # zero behind the position
                own.copy_(block[position - start])
        progress(d * len(blocks))
        yield layer, found


def _push_through_graph(chain: Chain, layer: int, blocks: Sequence[CausalBlock], probe: Probe) -> None:
    """Push blocks through a layer's own graph, in place."""
    trace, chunk = chain.trace, chain.chunk(chain.trace.width, chain.trace.width)

    def make(link: LayerLink) -> dict[str, Callable[[Tensor], Tensor]]:
        graph = link.graph()
        sublayers = [name for name in ("attn_out", "mlp_out") if name in graph.points]
        # Where both sublayers have a module, the layer adds what they add.
        ends = sublayers if len(sublayers) == 2 else ["resid_post"]
        x = graph.source("resid_pre")
        return {name: _pusher(batched_jvp(graph.points[name], x), x.device) for name in ends}

    def push_part(pushes: dict[str, Callable[[Tensor], Tensor]], unit: tuple[int, slice]) -> None:
        (index, columns), (start, block) = unit, blocks[unit[0]]
        rows, part = slice(start, start + len(block)), block[:, columns]
        # [S, n, d] -> [n, 1, T, d], with zeros at the positions before the block
        tangents = part.new_zeros(part.shape[1], 1, trace.length, trace.width)
        tangents[:, 0, rows] = part.transpose(0, 1)
        if "resid_post" in pushes:
            part.copy_(pushes["resid_post"](tangents)[:, 0, rows].transpose(0, 1))
            return
        for name, push in pushes.items():
            pushed = push(tangents)[:, 0]
            probe.record(index, name, columns, pushed[:, probe.position])
            part += pushed[:, rows].transpose(0, 1).to(part.device)

    units = [
        (index, slice(first, first + chunk))
        for index, (_, block) in enumerate(blocks)
        for first in range(0, block.shape[1], chunk)
    ]
    chain.layers[layer].each(make, push_part, units)


def _pusher(push: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tangents: push(tangents.to(device))
