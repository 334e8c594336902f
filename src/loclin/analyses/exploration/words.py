"""The words of an exploration: which ones, their rows of the output head, and their ranks in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from loclin.analyses.attribution.groups import find_skipped
from loclin.analyses.decode import decoder_at
from loclin.common.brief import brief
from loclin.common.progress import bar
from loclin.common.surroundings import eager_code
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.models.replica import exclusive
from loclin.network.ends import OutputHeadLink

_PREDICTED = 200
_LENS = 5
_PROBES = 4
_AGREEMENT, _COARSE = {torch.float64: 1e-9, torch.float32: 1e-4}, 0.05
_SCORES = 2**24
"""Numbers of logits that are sorted at a time."""
LENS_POSITIONS = 2048
"""The most layers times positions whose hidden states are decoded; beyond, only those of the prediction are."""
RANKS = 100_000
"""How many ranks of words at other positions are kept."""


@dataclass(frozen=True)
class Lens:
    """Every layer's hidden states through the model's own final norm and output head (the logit lens), in ranks.

    `positions` are P of the prompt's; `top` are ids of words, the best first; `ranks` those of the first m words, 1 for
    the best, and `ranks_here` those of all n words at the position of the prediction.
    """

    positions: list[int]
    top: Int[Tensor, "L P k"]
    ranks: Int[Tensor, "L P m"]
    ranks_here: Int[Tensor, "L n"]

    __repr__ = brief


@dataclass(frozen=True)
class Rows:
    """Logits as affine functions of the final hidden state: `directions` `[n, d]` and `offsets` `[n]`."""

    directions: Float[Tensor, "n d"]
    offsets: Float[Tensor, " n"]
    logits: Float[Tensor, " n"]  # at the prompt

    __repr__ = brief


def choose_words(lin: Linearized, position: int, first: Sequence[int], count: int) -> list[int]:
    """Choose `count` words: those given, the predicted ones, those of every layer, the prompt's, and frequent ones.

    Tokenizers number words by how frequent they are: those with the lowest numbers are taken that are letters.
    """
    logits = lin.trace.logits(position)
    finite = logits.isfinite().nonzero()[:, 0]
    best = finite[logits[finite].argsort(descending=True)].tolist()
    chosen = dict.fromkeys([*first, *best[:_PREDICTED]])
    if lin.model.task != "classification":
        chosen |= dict.fromkeys(_decode_layers(lin, position) if lin.model.task == "causal" else [])
        known = [token for token in lin.input_ids[0].tolist() if token < len(logits)]
        chosen |= dict.fromkeys(known)
        special = set(find_skipped(lin, "special"))
        texts = zip(range(len(logits)), lin.model.name_outputs(range(min(len(logits), 8 * count))), strict=False)
        plain = [i for i, text in texts if i not in special and (text.lstrip().isalpha() or not lin.model.tokenizer)]
        chosen |= dict.fromkeys(plain)
    kept = set(best)
    if ruled_out := [token for token in first if token not in kept]:
        raise OptionError(f"the model rules these words out (their logits are infinite): {ruled_out}; leave them out")
    return [token for token in chosen if token in kept][: max(count, len(set(first)))]


def read_rows(lin: Linearized, position: int, ids: Sequence[int]) -> Rows:
    """Read the rows of the frozen output head of some words, and last of the mean of all logits.

    The head's matrix is scaled row by row, by a factor of the model (its logit scale, its frozen soft cap) that a few
    random columns give and prove; where they disprove it, rows are pulled through the head. Cost: a few columns.
    """
    head, at = OutputHeadLink(lin.trace, position), torch.tensor(ids)
    width, value = lin.trace.final.shape[-1], head.value.double()
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(_PROBES, width, generator=generator, dtype=lin.trace.dtype).to(head.device)
    given = head.jvp(probes)[:, at].double()
    table = decoder_at(lin, position).rows_of(at).to(head.device, torch.float64)
    plain = probes.double() @ table.T
    scale = (given * plain).sum(0) / plain.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    directions = scale[:, None] * table
    if (given - scale * plain).norm() > _AGREEMENT.get(lin.trace.dtype, _COARSE) * given.norm():
        each = (one_hot(token, len(value)).to(probes) for token in at)
        directions = torch.cat([head.vjp(weights[None]).double() for weights in each])
    weights = torch.full_like(head.value, 1 / len(value))
    mean = head.vjp_in_parts(weights)
    offsets = sum((added.double() for added in head.constants().values()), start=torch.zeros_like(value))
    return Rows(
        torch.cat([directions, mean[None].to(directions)]),
        torch.cat([offsets[at], offsets.mean()[None]]),
        torch.cat([value[at], value.mean()[None]]),
    )


def _decode_layers(lin: Linearized, position: int) -> list[int]:
    """The first words of every layer at a position, the last layer's first."""
    scores = _score(lin, _states(lin, [position]), position)
    return scores.topk(min(_LENS, scores.shape[1])).indices.flip(0).flatten().tolist()


def look_at_layers(lin: Linearized, position: int, ids: Sequence[int]) -> Lens:
    """Rank words in every layer: at all positions, or at that of the prediction alone where these are too many.

    Nothing is frozen. Logit scales and soft caps are left out: they change no rank. Cost: L P products with the output
    head, and as many sorts.
    """
    n, last = lin.trace.n_layers, position + 1 if lin.trace.causal else lin.trace.length
    positions = list(range(last)) if n * last <= LENS_POSITIONS else [position]
    states = _states(lin, positions)
    some = torch.tensor(ids)
    most = min(len(ids), max(1, RANKS // len(states)))
    size = max(1, _SCORES // len(lin.trace.stock_logits))
    top, ranks, here = [], [], []
    for first in bar(range(0, len(states), size), desc="layers in words", unit="block"):
        scores = _score(lin, states[first : first + size], position)
        top.append(scores.topk(min(_LENS, scores.shape[1])).indices)
        ordered = scores.sort(dim=1).values
        own = scores[:, some.to(scores.device)]
        found = scores.shape[1] - torch.searchsorted(ordered, own.contiguous(), right=True) + 1
        ranks.append(found[:, :most])
        at = torch.arange(first, first + len(scores)) % len(positions) == positions.index(position)
        here.append(found[at.to(found.device)])
    by_layer = (n, len(positions), -1)
    return Lens(
        positions, torch.cat(top).reshape(by_layer), torch.cat(ranks).reshape(by_layer).int(), torch.cat(here).int()
    )


def _states(lin: Linearized, positions: list[int]) -> Float[Tensor, "m d"]:
    """What leaves each layer at some positions, through the model's own final norm, layer by layer."""
    trace, end = lin.trace, lin.trace.end
    trace.check_weights(trace.model.hf)
    streams = [*(call.hidden[0, positions] for call in trace.layers[1:]), end.hidden[0, positions]]
    with exclusive(trace.model.hf), eager_code(), torch.no_grad():
        return end(torch.cat([stream.to(end.hidden) for stream in streams])[None])[0].to(trace.dtype)


def _score(lin: Linearized, states: Float[Tensor, "m d"], position: int) -> Float[Tensor, "m V"]:
    """The logits of hidden states, but for scales and soft caps."""
    scores = decoder_at(lin, position).scores(states)
    bias = getattr(lin.model.head, "bias", None)
    return scores if bias is None else scores + bias.detach().to(scores)
