"""Every prefix map (embed -> a point of a layer) from one forward sweep.

The tangents of token i begin at position i: what comes before is zero and is not computed. Layers with explicit
products form each position's MLP once for all tokens; the others push each token's columns through their own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.network.blocks import Started, Tap, Workspace
from loclin.network.chain import Chain
from loclin.network.link import batched_jvp

Maps = dict[str, Float[Tensor, "n d_in d"]]
"""By component: for each of n tokens the transpose of its map."""


def prefix_maps(
    chain: Chain,
    position: int,
    tokens: range,
    components: Sequence[str] = ("resid_post",),
    progress: Callable[[int], None] = lambda _columns: None,
) -> Iterator[tuple[int, Maps]]:
    """The maps of some tokens to components of every layer at one position, layer after layer.

    Parameters
    ----------
    chain
        The links.
    position
        Where the maps end.
    tokens
        Where they begin. Where attention is causal, the maps of tokens behind `position` are zero and cost nothing.
    components
        Some of `attn_out`, `mlp_out` and `resid_post`.
    progress
        Told how many columns have passed a layer.

    Yields
    ------
    tuple[int, Maps]
        The layer, and the maps; overwritten by the next layer's.

    Raises
    ------
    OptionError
        Where no module of a layer gives a component alone.

    Notes
    -----
    Cost: `loclin.network.cost.prefix_sweep`. Memory: d^2 numbers for each token and each position behind it for the
    tangents (on an accelerator for each token and position), d^2 for each component and token, and a layer's own.
    """
    trace, d = chain.trace, chain.trace.width
    device, stop = trace.layers[0].hidden.device, position + 1 if trace.causal else trace.length
    for component in components:
        if component != "resid_post":
            for layer in range(trace.n_layers):
                trace.part(layer, component)
    blocks, sources = [], [token for token in tokens if token < stop]
    # One position's tangents lie together, so that they go through its matrix in one product.
    room = torch.empty(stop, len(sources), d, d, dtype=trace.dtype, device=device)
    for number, token in enumerate(sources):
        start = token if trace.causal else 0
        block = room[start:, number].zero_()
        block[token - start].fill_diagonal_(1)
        blocks.append(Started(start, block))
    found = {name: torch.zeros(len(tokens), d, d, dtype=trace.dtype, device=device) for name in components}
    workspace = Workspace()

    def see(index: int, name: str, columns: slice, pushed: Tensor) -> None:
        if name in found:
            found[name][index, columns] = pushed.to(device)

    for layer in range(trace.n_layers):
        last = layer == trace.n_layers - 1
        wanted = slice(position, position + 1) if last else slice(0, stop)
        products = chain.products(layer, workspace)
        if products is not None:
            products.jvp(blocks, wanted, chain.chunk(d, d), tap=Tap(position, see))
        else:
            _generic(chain, layer, blocks, Tap(position, see))
        if "resid_post" in found:
            for own, (start, block) in zip(found["resid_post"], blocks, strict=False):  # zero behind the position
                own.copy_(block[position - start])
        progress(d * len(blocks))
        yield layer, found


def _generic(chain: Chain, layer: int, blocks: Sequence[Started], tap: Tap) -> None:
    """Push blocks through a layer's own graph, in place."""
    trace, link = chain.trace, chain.layers[layer]
    graph = link.graph()
    x, parts = graph.source("resid_pre"), [name for name in ("attn_out", "mlp_out") if name in graph.points]
    # Where both parts have a place, what they add is what the layer adds.
    pushes = {name: batched_jvp(graph.points[name], x) for name in (parts if len(parts) == 2 else ["resid_post"])}
    chunk = chain.chunk(trace.width, trace.width)
    for index, (start, block) in enumerate(blocks):
        rows = slice(start, start + len(block))
        for first in range(0, block.shape[1], chunk):
            columns = slice(first, first + chunk)
            part = block[:, columns]
            tangents = part.new_zeros(part.shape[1], 1, trace.length, trace.width)
            tangents[:, 0, rows] = part.transpose(0, 1)
            tangents = tangents.to(link.device)
            if len(parts) < 2:
                part.copy_(pushes["resid_post"](tangents)[:, 0, rows].transpose(0, 1))
                continue
            for name, push in pushes.items():
                pushed = push(tangents)[:, 0]
                tap.see(index, name, columns, pushed[:, tap.position])
                part += pushed[:, rows].transpose(0, 1).to(part.device)
