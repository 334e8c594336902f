"""Large singular vectors that write watched words: their exact parts of the logits, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.decode import Decoder
from loclin.common.arguments import strings, whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized, question
from loclin.models import Model
from loclin.models.forward import logits_at
from loclin.network.ends import OutputHeadLink
from loclin.network.points import parse_point
from loclin.results.provenance import Provenance
from loclin.results.result import AtPrompt
from loclin.results.serialise import TENSORS_ONLY
from loclin.spectral import SVD, to_wide
from loclin.steering.concepts import packaged_concepts, token_ids
from loclin.steering.match import fingerprint
from loclin.steering.projection import Projection
from loclin.steering.search import score
from loclin.steering.writing import Continuation, write

_DEPENDENT = 1e-6
"""Relative size below which a singular value of the stacked directions counts as zero."""


@dataclass(frozen=True)
class Hit:
    """A singular vector that writes a watched word."""

    token: int  # and `text`: of the prompt, to whose map it belongs
    text: str
    rank: int  # among the map's singular values, from 1
    value: float  # the singular value
    gain: float  # v . x: how strongly the token's embedding excites it
    writes: list[str]  # the words that it writes with the sign of its gain, the strongest first
    watched: list[str]  # the watched ones among them

    __repr__ = brief


@dataclass(frozen=True)
class TokenShare:
    """A possible next token, its logit, and the part of the logit that comes from the hits."""

    text: str
    probability: float
    logit: float
    part: float  # the sum over the hits of sigma (v . x) u, through the output head: an exact part of the logit
    without: float  # the probability after the hits' directions are projected out
    watched: bool  # the token begins a watched word


@dataclass(frozen=True)
class Effect:
    """What projecting the directions out changes, as means over prompts."""

    gain: float  # of the log-probability that the next token begins a watched word, in nats
    kl: float  # KL(without || with) of the next token, in nats: the cost
    prompts: int  # how many


@dataclass(frozen=True)
class Watched(AtPrompt):
    """Singular vectors that write watched words, and the effects of removing them; made by `watch`.

    Attributes
    ----------
    words: the watched words.
    hits: the singular vectors that write watched words, by decreasing |value * gain|.
    shares: the most probable next tokens, and the most probable watched ones.
    here, elsewhere: the effect of removing the hits at this prompt, and at the packaged neutral prompts; None without
        hits, as are `normal` and `without`, the texts that the model writes with and without them.
    searched: the number of singular vectors that were decoded.
    provenance, settings: model, prompt, gate and map; `k` and `top`.
    warnings: what a reader should know before trusting it.
    projection: projects the hits' directions out, by `projection.apply(model)` in a `with`. It is too large for JSON:
        save the result as `.safetensors`.
    """

    words: list[str]
    hits: list[Hit]
    shares: list[TokenShare]
    here: Effect | None
    elsewhere: Effect | None
    normal: Continuation | None
    without: Continuation | None
    searched: int
    provenance: Provenance
    settings: dict[str, Any]
    warnings: list[str]
    projection: Projection | None = field(default=None, repr=False, compare=False, metadata=TENSORS_ONLY)

    def table(self) -> dict[str, list[Any]]:
        """One row per hit."""
        names = ("token", "text", "rank", "value", "gain")
        columns: dict[str, list[Any]] = {name: [getattr(hit, name) for hit in self.hits] for name in names}
        return columns | {name: [" ".join(getattr(hit, name)) for hit in self.hits] for name in ("watched", "writes")}


@question
@with_progress
def watch(
    lin: Linearized,
    words: Sequence[str],
    *,
    k: int = 8,
    top: int = 5,
    layer: int | None = None,
    sinks: bool = False,
    n_tokens: int = 8,
    max_new_tokens: int = 30,
    progress: Progress = True,
) -> Watched:
    """Search the words of a prompt's largest singular vectors for watched words, and project those vectors out.

    Parameters
    ----------
    lin
        The model at the prompt; its map to the last position is searched.
    k
        How many singular vectors of each token's map to search.
    top
        A vector is a hit if one of the `top` tokens that it writes begins a watched word.
    layer
        Search the map to this layer's output, followed by the final norm, and project the directions out there. None:
        the final hidden state.
    sinks
        Search the maps of attention sinks and of a beginning token, too. Their first singular vector writes tokens that
        are probable everywhere, and without it the model's text degenerates.
    n_tokens
        For how many of the most probable next tokens to compute the hits' parts.
    max_new_tokens
        The length of the texts, with and without the hits; less if the model's context ends.
    progress
        True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.

    Raises
    ------
    OptionError, PromptError
        For a k or a layer that does not exist, without words, or when no token begins any of them.

    Notes
    -----
    Cost: the dense map, its singular vectors, and some forward passes. Near-equal singular values leave single vectors
    undefined; such vectors are used as the SVD returns them.
    """
    lin.model.refuse_other_tasks("watching words", "causal")
    if lin.model.inputs:
        raise PromptError("watch writes texts from token ids: give a prompt without images and inputs_embeds")
    tell, words, k = steps(progress), strings("words", words), whole("k", k)
    layer = None if layer is None else whole("layer", layer)
    if not words:
        raise OptionError("watch needs at least one word: give words=[...]")
    vocabulary = Decoder(lin.model).vocabulary
    top, n_tokens = (whole(*given, 1, vocabulary) for given in (("top", top), ("n_tokens", n_tokens)))
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    model, watched = lin.trace.model.replicate(), set(token_ids(lin.model, words))
    point = "final" if layer is None else f"resid_post.{layer}"
    J = lin.jacobian(target=point, normed=layer is not None)
    tell("singular vectors")
    svd = J.svd(k)
    gains = svd.gains(J.input)
    tell("words")
    skipped = [] if sinks else lin.non_words
    found = [hit for hit in _find_hits(lin, svd, gains, watched, top) if hit.token not in skipped]
    directions = [svd.U[hit.token, :, hit.rank - 1] for hit in found]
    # after a layer, other layers follow: its vectors have no exact part of the logits
    parts = _sum_parts(lin, found if layer is None else [], svd, gains)
    tell("projecting them out")
    projection = _span_directions(lin, directions, point, J.provenance())
    before, after = (_predict(model, lin.input_ids, p) for p in (None, projection))
    here = elsewhere = normal = without = None
    if found:
        prompts = [model.encode(prompt, bos=None) for prompt in packaged_concepts().choosing]
        pairs = [(_predict(model, ids, None), _predict(model, ids, projection)) for ids in prompts]
        here, elsewhere = _measure_effect([(before, after)], watched), _measure_effect(pairs, watched)
        if model.context_length is not None:
            max_new_tokens = min(max_new_tokens, model.context_length - lin.input_ids.shape[1] + 1)
        tell("writing with them")
        (normal,) = write(model, [lin.input_ids], words, max_new_tokens=max_new_tokens)
        tell("writing without them")
        with projection.apply(model):
            (without,) = write(model, [lin.input_ids], words, max_new_tokens=max_new_tokens)
    return Watched(
        words=words,
        hits=found,
        shares=_share_tokens(lin, parts, before, after, watched, n_tokens),
        here=here,
        elsewhere=elsewhere,
        normal=normal,
        without=without,
        searched=(len(lin.tokens) - len(skipped)) * k,
        provenance=J.provenance(),
        settings={"k": k, "top": top},
        warnings=lin.warnings,
        projection=projection,
    )


def _sum_parts(lin: Linearized, hits: list[Hit], svd: SVD, gains: Float[Tensor, "T k"]) -> Float[Tensor, " V"]:
    """Sum the hits' parts of the logits: sigma (v . x) u through the output head, for each."""
    head = OutputHeadLink(lin.trace, lin.trace.length - 1)
    parts = torch.zeros_like(lin.trace.logits(lin.trace.length - 1))
    for hit in hits:
        token, j = hit.token, hit.rank - 1
        parts = parts + head.jvp((svd.S[token, j] * gains[token, j] * svd.U[token, :, j])[None])[0]
    return parts


def _find_hits(lin: Linearized, svd: SVD, gains: Float[Tensor, "T k"], watched: set[int], top: int) -> list[Hit]:
    """Find the vectors of whose `top` words, with the sign of the gain, one is watched."""
    length, _, k = svd.U.shape
    signed = (svd.U * gains.sign().unsqueeze(1)).transpose(1, 2).reshape(length * k, -1)
    texts = set(lin.model.decode_each(sorted(watched)))
    hits = []
    for n, written in enumerate(Decoder(lin.model).writes(signed, top)):
        token, j = divmod(n, k)
        said = [text for text, _ in written]
        matched = [text for text in said if text in texts]
        if matched:
            value, gain = svd.S[token, j].item(), gains[token, j].item()
            hits.append(Hit(token, lin.tokens[token], j + 1, value, gain, said, matched))
    return sorted(hits, key=lambda hit: -abs(hit.value * hit.gain))


def _span_directions(lin: Linearized, directions: list[Tensor], point: str, provenance: Any) -> Projection:
    """Span directions that are given after the final norm; for a layer, span their vjp through that norm."""
    trace, model = lin.trace, lin.model
    where = parse_point(point, trace.n_layers)
    module = trace.sequence.exit if where.layer is None else trace.layers[where.layer].block.module
    names = {part: name for name, part in trace.model.hf.named_modules()}
    width = trace.width if where.layer is not None else trace.final.shape[-1]
    rows = torch.stack(directions) if directions else trace.final.new_zeros(0, width)
    if where.layer is not None and directions:
        rows = lin.chain.norm(where, trace.length - 1).vjp(rows)
    U, S, _ = torch.linalg.svd(to_wide(rows.T), full_matrices=False)
    least = _DEPENDENT * S.max().item() if len(S) else 0.0
    return Projection(
        basis=U[:, least < S].contiguous(),
        module=names[module],
        model=model.info.to_dict(),
        weights=fingerprint(model.hf),
        provenance=provenance,
    )


@torch.no_grad()
def _predict(model: Model, ids: Tensor, projection: Projection | None) -> Float[Tensor, " V"]:
    with nullcontext() if projection is None else projection.apply(model):
        return torch.log_softmax(logits_at(model, ids, ids.shape[1] - 1).float(), dim=-1)


def _measure_effect(pairs: list[tuple[Tensor, Tensor]], watched: set[int]) -> Effect:
    before, after = (torch.stack(side) for side in zip(*pairs, strict=True))
    found = score(before, sorted(watched), after)
    return Effect(found.gain.mean().item(), found.kl.mean().item(), len(pairs))


def _share_tokens(
    lin: Linearized, parts: Tensor, before: Tensor, after: Tensor, watched: set[int], n: int
) -> list[TokenShare]:
    """List the n most probable next tokens, and the three most probable watched ones."""
    ids = sorted(watched)
    likely = before[ids].topk(min(3, len(ids))).indices.tolist()
    chosen = list(dict.fromkeys([*before.topk(n).indices.tolist(), *(ids[i] for i in likely)]))
    chosen.sort(key=lambda i: -before[i].item())
    logits = lin.trace.logits(lin.trace.length - 1)
    return [
        TokenShare(text, before[i].exp().item(), logits[i].item(), parts[i].item(), after[i].exp().item(), i in watched)
        for i, text in zip(chosen, lin.model.decode_each(chosen), strict=True)
    ]
