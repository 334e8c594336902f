"""Exact attribution: a target of the frozen network as a sum of shares.

The residual stream is a sum: the embedding, every attention's output and every MLP's. A target reads it linearly, so
each term has its share, and so has each part of a term (a head, a neuron). A term in turn comes from the tokens and the
biases in front of it: pulled back to the embeddings, its share is theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch

from loclin.analyses.attribution.result import Attribution, By, Kind
from loclin.analyses.attribution.shares import Shares, by_part, by_source, by_token_and_layer, swept
from loclin.analyses.attribution.target import Reading, Target, described, read
from loclin.analyses.attribution.wording import in_words
from loclin.common.arguments import whole
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.network import memory
from loclin.network.chain import Chain

LEVELS: tuple[By, ...] = get_args(By)
_SPELLINGS = {"tokenxlayer": "token×layer", "token*layer": "token×layer"}
_SPLITS: dict[By, Kind] = {"head": "attn_out", "neuron": "mlp_out"}


@in_plain_torch
def attribute(
    lin: Linearized, target: Target = None, by: str = "token", *, position: int = -1, words: int = 12
) -> Attribution:
    """Share out a target exactly.

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    target
        A token's logit, by text or id (None: the predicted token's over the mean of all); two tokens: the difference
        of their logits;
        `Margin`, `Neuron`, `Direction`, or a vector `[d]` at `final`.
    by
        `"token"`: what each input token gives (J_i x_i through the target), and each bias, by all ways.
        `"bias"`: the same with the tokens as one.
        `"layer"`: what the embedding, each attention and each MLP write into the target, directly; what later layers
        make of it is in theirs.
        `"head"`: the same with each attention as its query heads and the biases behind them.
        `"neuron"`: the same with each MLP as its neurons and the biases behind them.
        `"token×layer"`: what each token (and the biases) give by way of each attention or MLP as the last one that
        writes: rows sum to `"token"`, columns to `"layer"`. `"token x layer"` and `"token*layer"` are the same.
    position
        Where the target is read.
    words
        How many of the largest shares to put into words (not for tokens and biases).

    Returns
    -------
    Attribution
        Its shares sum to the target; `residual` is what rounding leaves.

    Raises
    ------
    OptionError
        For an unknown `by`; for a target that is not one (see `loclin.analyses.attribution.target.read`); where a model
        has no layers, heads or neurons to tell apart.
    PromptError
        For a position outside the prompt.

    Notes
    -----
    Cost: by token or bias one column backward, and two forward passes of each layer that has biases. By layer, head or
    neuron a graph of each layer (two forward passes) and two columns. By token × layer a graph of each layer and L
    columns, for two of each layer go through the layers in front of it. Memory: one layer's graph; by token × layer
    the budget, for as many of 2 L columns at a time as it holds (each time with graphs of its own). Where float32
    rounds the sum by more than 5e-7, all is done again in float64.
    """
    chosen, words = level(by), whole("words", words, 0)
    reading = read(lin, target, position)
    if chosen not in ("token", "bias") and lin.trace.route.whole is not None:
        raise OptionError(
            f"{lin.model.info.name} has no layers to tell apart: {lin.trace.route.whole}; by='token' and by='bias' work"
        )
    shares = swept(lin.chain, reading, lambda chain: _shared(lin, chain, reading, chosen))
    rows = shares.ordered()
    kinds, layers, indices, tokens = (torch.tensor([row[i] for row in rows]) for i in range(4))
    given, passing = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (4, 5))
    found = Attribution(
        by=chosen,
        target=described(lin, reading),
        shares=given,
        through=passing if chosen in ("layer", "head", "neuron") else None,
        kinds=kinds,
        layers=layers,
        indices=indices,
        tokens=tokens,
        biases=list(shares.biases),
        writes={},
        attends={},
        sinks=lin.sinks,
        warnings=[*lin.warnings, *reading.warnings, *shares.notes],
        provenance=replace(lin.jacobian(position=position).provenance(), target=reading.at),
    )
    return in_words(lin, reading, found, words)


def _shared(lin: Linearized, chain: Chain, reading: Reading, level: By) -> Shares:
    if level in ("token", "bias"):
        return by_source(chain, reading, together=level == "bias")
    if level == "token×layer":
        return by_token_and_layer(chain, reading, memory.budget(lin.memory, lin.model.device))
    return by_part(chain, reading, _SPLITS.get(level))


def level(by: str) -> By:
    """Read a level's name, however it is spelled."""
    plain = by.replace(" ", "")
    plain = _SPELLINGS.get(plain, plain)
    if plain not in LEVELS:
        raise OptionError(f"by={by!r}: choose one of {', '.join(LEVELS)}")
    return plain
