"""The largest shares in words: what the components write into the output, and where heads read it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loclin.analyses.attribution.result import Attribution, Share
from loclin.analyses.attribution.shares import list_additions
from loclin.analyses.attribution.target import Readout
from loclin.analyses.decode import Decoder
from loclin.maps.linearized import Linearized
from loclin.network.autograd import batched_jvp
from loclin.network.points import Point
from loclin.network.units import UnitFinder

_WORDS = 8


def put_into_words(lin: Linearized, readout: Readout, found: Attribution, most: int) -> Attribution:
    """Add the words of the `most` largest shares to an attribution by layer, head or neuron, and where heads read.

    The words are the tokens whose logits the component's output raises most, through the frozen final norm. Cost: a
    graph of each layer that has such a share, one column of that layer for each, and one product with the output head.
    """
    if found.by not in ("layer", "head", "neuron") or readout.node != 2 * lin.trace.n_layers:
        return found
    chosen = [i for i in found.ranking(most, found.unit) if found.parts[i].kind != "bias"]
    written, attends = dict[int, Tensor](), dict[str, list[float]]()
    for layer in dict.fromkeys(found.parts[i].layer for i in chosen):
        here = [i for i in chosen if found.parts[i].layer == layer]
        if layer is None:
            written |= {i: lin.embeddings[readout.position] for i in here}
        else:
            _describe_layer(lin, readout, layer, {i: found.parts[i] for i in here}, written, attends)
    if not chosen:
        return found
    norm = lin.chain.norm(Point("final"), readout.position)
    vectors = norm.jvp(torch.stack([written[i].to(lin.embeddings) for i in chosen]))
    words = Decoder(lin.model).writes(vectors, _WORDS)
    return replace(found, writes={str(i): row for i, row in zip(chosen, words, strict=True)}, attends=attends)


def _describe_layer(
    lin: Linearized,
    readout: Readout,
    layer: int,
    parts: dict[int, Share],
    written: dict[int, Tensor],
    attends: dict[str, list[float]],
) -> None:
    """Find what some components of one layer write at the target's position, and where its heads read."""
    values = dict(list_additions(lin.trace, layer, "resid_post"))
    written |= {i: values[part.kind][readout.position] for i, part in parts.items() if part.kind in values}
    units = {i: part for i, part in parts.items() if part.kind not in values}
    if not units:
        return
    finder = UnitFinder(lin.trace.layers[layer].block.sublayers)
    graph = lin.chain.layers[layer].graph(collect=lin.trace.biased[layer], finder=finder)
    kind = "attn_out" if next(iter(units.values())).kind == "head" else "mlp_out"
    output = graph.points[kind]
    found = finder.projection(kind, output, graph.constants)
    assert found is not None  # the attribution has split it before
    push, source = batched_jvp(output, found.source), found.source
    for i, part in units.items():
        alone = found.isolate(source.detach(), part.index or 0)
        written[i] = push(alone[None])[0, 0, readout.position]
        if part.kind == "head":
            (weights,) = torch.autograd.grad(output, source, readout.cotangent[None].to(output), retain_graph=True)
            mine = found.isolate(weights, part.index or 0)
            x = graph.points["resid_pre"]
            (pulled,) = torch.autograd.grad(source, x, mine, retain_graph=True)
            attends[str(i)] = (pulled.double() * x.detach().double()).sum(-1)[0].tolist()
