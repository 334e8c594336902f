"""The largest shares in words: what they write into the output, and where heads read it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loclin.analyses.attribution.result import Attribution, Share
from loclin.analyses.attribution.shares import added
from loclin.analyses.attribution.target import Reading
from loclin.analyses.decode import Decoder
from loclin.maps.linearized import Linearized
from loclin.network.link import batched_jvp
from loclin.network.points import Point
from loclin.network.units import Inside

_WORDS = 8


def in_words(lin: Linearized, reading: Reading, found: Attribution, most: int) -> Attribution:
    """Add to an attribution by layer, head or neuron what its `most` largest shares write, and what heads attend to.

    Words are those whose logits a part raises most, itself as it is here, through the frozen final norm. Cost: a graph
    of each layer that has one of them, one column of that layer for each, and a product with the head.
    """
    if found.by not in ("layer", "head", "neuron") or reading.node != 2 * lin.trace.n_layers:
        return found
    chosen = [i for i in found.ranking(most, found.unit) if found.parts[i].kind != "bias"]
    written, attends = dict[int, Tensor](), dict[str, list[float]]()
    for layer in dict.fromkeys(found.parts[i].layer for i in chosen):
        here = [i for i in chosen if found.parts[i].layer == layer]
        if layer is None:
            written |= {i: lin.embeddings[reading.position] for i in here}
        else:
            _layer(lin, reading, layer, {i: found.parts[i] for i in here}, written, attends)
    if not chosen:
        return found
    norm = lin.chain.norm(Point("final"), reading.position)
    vectors = norm.jvp(torch.stack([written[i].to(lin.embeddings) for i in chosen]))
    words = Decoder(lin.model).writes(vectors, _WORDS)
    return replace(found, writes={str(i): row for i, row in zip(chosen, words, strict=True)}, attends=attends)


def _layer(
    lin: Linearized,
    reading: Reading,
    layer: int,
    parts: dict[int, Share],
    written: dict[int, Tensor],
    attends: dict[str, list[float]],
) -> None:
    """What some parts of one layer write at the target's position, and what its heads attend to."""
    values = dict(added(lin.trace, layer, "resid_post"))
    written |= {i: values[part.kind][reading.position] for i, part in parts.items() if part.kind in values}
    units = {i: part for i, part in parts.items() if part.kind not in values}
    if not units:
        return
    inside = Inside(lin.trace.layers[layer].block.parts)
    graph = lin.chain.layers[layer].graph(collect=lin.trace.biased[layer], inside=inside)
    kind = "attn_out" if next(iter(units.values())).kind == "head" else "mlp_out"
    output = graph.points[kind]
    found = inside.projection(kind, output, graph.constants)
    assert found is not None  # it has been divided before
    push, source = batched_jvp(output, found.source), found.source
    for i, part in units.items():
        alone = found.alone(source.detach(), part.index or 0)
        written[i] = push(alone[None])[0, 0, reading.position]
        if part.kind == "head":
            (weights,) = torch.autograd.grad(output, source, reading.cotangent[None].to(output), retain_graph=True)
            mine = found.alone(weights, part.index or 0)
            x = graph.points["resid_pre"]
            (pulled,) = torch.autograd.grad(source, x, mine, retain_graph=True)
            attends[str(i)] = (pulled.double() * x.detach().double()).sum(-1)[0].tolist()
