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
_TOGETHER = 64
"""How many groups of tokens are pushed from the first of their tokens on."""
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
        _push_through_layer(chain, layer, blocks, Probe(position, record), chain.chunk(d, d), workspace)
        if "resid_post" in found:
            for own, (start, block) in zip(found["resid_post"], blocks, strict=False):  # zero behind the position
                own.copy_(block[position - start])
        progress(d * len(blocks))
        yield layer, found


def push_embeddings(
    chain: Chain,
    position: int,
    groups: Sequence[Sequence[int]],
    spare: int,
    progress: CountColumns = lambda _columns: None,
) -> list[dict[str, Float[Tensor, "n d"]]]:
    """What the embeddings of each of n groups of tokens make of every layer's components at one position.

    It is their effect along all paths on which that component writes last. For each layer: what they make of `attn_out`
    and `mlp_out`, or of `block`, the sum of both, where a layer does not tell them apart. The groups are in the order
    of their first tokens.

    Cost: a column for each group; with causal attention only at the positions behind its first token. Memory: T d
    numbers for each group at a time, for as many as fit into `spare` bytes.
    """
    trace, stop = chain.trace, position + 1 if chain.trace.causal else chain.trace.length
    most = max(1, spare // (2 * stop * trace.width * trace.dtype.itemsize))
    found: list[list[dict[str, Tensor]]] = [[] for _ in range(trace.n_layers)]
    for first in range(0, len(groups), most):
        some = groups[first : first + most]
        for pushed, layer in zip(_push_some(chain, position, some), found, strict=True):
            layer.append(pushed)
            progress(len(some))
    return [{name: torch.cat([one[name] for one in layer]) for name in layer[0]} for layer in found]


def _push_some(
    chain: Chain, position: int, groups: Sequence[Sequence[int]]
) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
    """The same for as many groups as are pushed at a time."""
    trace, n, x = chain.trace, len(groups), chain.trace.layers[0].value[0]
    stop, workspace = position + 1 if trace.causal else trace.length, Workspace()
    stream = x.new_empty(stop, n, trace.width)
    blocks: list[CausalBlock] = []
    for first in range(0, n, _TOGETHER):
        some = groups[first : first + _TOGETHER]
        start = min([token for group in some for token in group if token < stop], default=stop) if trace.causal else 0
        block = stream[start:, first : first + len(some)].zero_()
        for column, group in enumerate(some):
            for token in group:
                if token < stop:
                    block[token - start, column] = x[token]
        if start < stop:
            blocks.append(CausalBlock(start, block))
    found: dict[str, Tensor] = {}

    def record(index: int, name: str, columns: slice, pushed: Tensor) -> None:
        of_block = range(n)[index * _TOGETHER : (index + 1) * _TOGETHER][columns]
        found.setdefault(name, x.new_zeros(n, trace.width))[of_block.start : of_block.stop] = pushed.to(x.device)

    for layer in range(trace.n_layers):
        found.clear()
        before = _at_position(blocks, position, x.new_zeros(n, trace.width))
        most = max((block.shape[1] for _, block in blocks), default=1)
        _push_through_layer(chain, layer, blocks, Probe(position, record), chain.chunk(most, most), workspace)
        if not found:
            found["block"] = _at_position(blocks, position, torch.zeros_like(before)) - before
        yield dict(found)


def _at_position(blocks: Sequence[CausalBlock], position: int, found: Tensor) -> Float[Tensor, "n d"]:
    for index, (start, block) in enumerate(blocks):
        found[index * _TOGETHER : index * _TOGETHER + block.shape[1]] = block[position - start]
    return found


def _push_through_layer(
    chain: Chain, layer: int, blocks: Sequence[CausalBlock], probe: Probe, chunk: int, workspace: Workspace
) -> None:
    """Push blocks through a layer, in place: where it is the last, only the probe's position is right."""
    trace, position = chain.trace, probe.position
    stop = position + 1 if trace.causal else trace.length
    wanted = slice(position, position + 1) if layer == trace.n_layers - 1 else slice(0, stop)
    explicit = chain.explicit_layer(layer, workspace)
    if explicit is not None:
        explicit.jvp(blocks, wanted, chunk, probe=probe)
    else:
        _push_through_graph(chain, layer, blocks, probe, chunk)


def _push_through_graph(chain: Chain, layer: int, blocks: Sequence[CausalBlock], probe: Probe, chunk: int) -> None:
    """Push blocks through a layer's own graph, in place."""
    trace = chain.trace

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
