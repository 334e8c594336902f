"""Exact attribution: a target of the frozen network as a sum of shares.

The residual stream is the sum of the embedding, every attention output and every MLP output. A target is linear in it:
`target = sum_c g . c`, with the target's gradient g and one term, the direct effect, for each component c. The vjp of g
down to the embeddings gives the total effect of each token and of each bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch

from loclin.analyses.attribution.result import Attribution, By, Kind
from loclin.analyses.attribution.shares import (
    Shares,
    compute_shares,
    share_by_component,
    share_by_source,
    share_by_token_and_layer,
)
from loclin.analyses.attribution.target import Readout, Target, describe_target, read_target
from loclin.analyses.attribution.wording import put_into_words
from loclin.common.arguments import whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question
from loclin.network import memory
from loclin.network.chain import Chain

LEVELS: tuple[By, ...] = get_args(By)
_SPELLINGS = {"tokenxlayer": "token×layer", "token*layer": "token×layer"}
_SPLITS: dict[By, Kind] = {"head": "attn_out", "neuron": "mlp_out"}


@question
@with_progress
def attribute(
    lin: Linearized,
    target: Target = None,
    *,
    by: str = "token",
    position: int = -1,
    in_words: int = 12,
    progress: Progress = True,
) -> Attribution:
    """Split a target into exact shares, which sum to it up to rounding (`Attribution.residual`).

    Cost: by token or bias one column backward, and two forward passes of each layer that has biases. By layer, head or
    neuron a graph of each layer (two forward passes) and two columns. By token × layer a graph of each layer and L
    columns, since the two columns of each layer go through the layers below it. Memory: one layer's graph; by token ×
    layer the budget, for as many of the 2 L columns at a time as fit (each batch builds its graphs again). If
    float32 rounds the sum by more than 5e-7, everything is computed again in float64.

    Raises OptionError for an unknown `by`; for an invalid target (see
    `loclin.analyses.attribution.target.read_target`); for a model whose layers, heads or neurons cannot be told apart;
    PromptError for a position outside the prompt.

    Parameters
    ----------
    lin: From `loclin.linearize`.
    target: A token's logit, by text or id; two tokens: the difference of their logits; `Margin`, `Neuron`, `Direction`,
        or a vector `[d]` at `final`. None: the predicted token's logit minus the mean of all logits.
    by: One of
        `"token"`: the total effect of each input token (J_i x_i through the target) and of each bias.
        `"bias"`: the same, with all tokens as one share.
        `"layer"`: the direct effect of the embedding, of each attention and of each MLP. What later layers compute from
        a component's output counts as theirs.
        `"head"`: the same, with each attention split into its query heads and the biases after them.
        `"neuron"`: the same, with each MLP split into its neurons and the biases after them.
        `"token×layer"`: the effect of each token (and of the biases) along all paths on which a given attention or MLP
        is the last component that writes. Rows sum to `"token"`, columns to `"layer"`. `"token x layer"` and
        `"token*layer"` are the same.
    position: The position at which the target is read.
    in_words: How many of the largest shares to put into words (not for tokens and biases).
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    chosen, in_words, tell = parse_level(by), whole("in_words", in_words, 0), steps(progress)
    readout = read_target(lin, target, position)
    if chosen not in ("token", "bias") and lin.trace.sequence.fallback_reason is not None:
        raise OptionError(
            f"{lin.model.info.name} has no layers to tell apart: {lin.trace.sequence.fallback_reason}; "
            "use by='token' or by='bias'"
        )
    tell(f"shares by {chosen}")
    shares = compute_shares(lin.chain, readout, lambda chain: _share(lin, chain, readout, chosen))
    rows = shares.sort_rows()
    kinds, layers, indices, positions = (torch.tensor([row[i] for row in rows]) for i in range(4))
    given, passing = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (4, 5))
    found = Attribution(
        by=chosen,
        target=describe_target(lin, readout),
        shares=given,
        through=passing if chosen in ("layer", "head", "neuron") else None,
        kinds=kinds,
        layers=layers,
        indices=indices,
        positions=positions,
        biases=list(shares.biases),
        writes={},
        attends={},
        sinks=lin.sinks,
        warnings=[*lin.warnings, *readout.warnings, *shares.notes],
        provenance=replace(lin.jacobian(position=position).provenance(), target=readout.at),
    )
    return put_into_words(lin, readout, found, in_words)


def _share(lin: Linearized, chain: Chain, readout: Readout, level: By) -> Shares:
    if level in ("token", "bias"):
        return share_by_source(chain, readout, together=level == "bias")
    if level == "token×layer":
        return share_by_token_and_layer(chain, readout, memory.budget(lin.memory, lin.model.device))
    return share_by_component(chain, readout, _SPLITS.get(level))


def parse_level(by: str) -> By:
    """Parse the name of a level, in any of its spellings.

    Raises OptionError for an unknown level.
    """
    plain = by.replace(" ", "")
    plain = _SPELLINGS.get(plain, plain)
    if plain not in LEVELS:
        raise OptionError(f"by={by!r}: choose one of {', '.join(LEVELS)}")
    return plain
