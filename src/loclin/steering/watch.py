"""Large singular vectors of a prompt's map that write watched words: what they give to the logits; removing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.decode import Decoder
from loclin.common.arguments import strings, whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.network.link import HeadLink
from loclin.network.points import parse
from loclin.network.route import logits_at
from loclin.results.result import versions
from loclin.spectral import widened
from loclin.steering.concepts import packaged_concepts, token_ids
from loclin.steering.match import fingerprint
from loclin.steering.operator import no_words
from loclin.steering.projection import Projection
from loclin.steering.search import Continuation, write

_DEPENDENT = 1e-6
"""A direction whose rest outside the others is smaller than this adds nothing to their span."""


@dataclass(frozen=True)
class Hit:
    """A singular vector that writes a watched word.

    Attributes
    ----------
    token, text
        The prompt's token whose map it belongs to.
    rank, value
        Its place among that map's singular values, from 1, and the value.
    gain
        v x, how strongly the token's embedding excites it.
    writes
        The words that it writes as it is excited, the strongest first.
    watched
        Those of them that are watched.
    """

    token: int
    text: str
    rank: int
    value: float
    gain: float
    writes: list[str]
    watched: list[str]

    __repr__ = brief


@dataclass(frozen=True)
class Share:
    """A next token, its logit, and what the hits give to it.

    Attributes
    ----------
    text, probability, logit
        The next token.
    part
        The sum over the hits of sigma (v x) times u through the head: an exact part of the logit.
    without
        Its probability once the hits' directions are taken out.
    watched
        Whether it begins a watched word.
    """

    text: str
    probability: float
    logit: float
    part: float
    without: float
    watched: bool


@dataclass(frozen=True)
class Effect:
    """What taking the directions out changes, as means over prompts.

    Attributes
    ----------
    gain
        Change of the log-probability that the next token begins a watched word, in nats.
    kl
        KL(without || with) of the next token, in nats: the cost.
    prompts
        Over how many prompts.
    """

    gain: float
    kl: float
    prompts: int


@dataclass(frozen=True)
class Watched:
    """What `watch` found.

    Attributes
    ----------
    prompt, words
        The prompt's tokens, joined, and the watch list.
    hits
        The singular vectors that write watched words, the largest part of the predicted logit first.
    shares
        The most probable next tokens, and the watched ones among the likely.
    here, elsewhere
        What removing them does at this prompt, and at the packaged neutral prompts.
    normal, without
        What the model writes, with them and without; None where nothing was hit.
    searched
        How many singular vectors were looked at.
    settings
        Model, options and versions.
    warnings
        What a reader should know before trusting it.
    """

    prompt: str
    words: list[str]
    hits: list[Hit]
    shares: list[Share]
    here: Effect | None
    elsewhere: Effect | None
    normal: Continuation | None
    without: Continuation | None
    searched: int
    settings: dict[str, Any]
    warnings: list[str]

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)


@in_plain_torch
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
    progress: Progress = silent,
) -> tuple[Watched, Projection]:
    """Look for watched words in what a prompt's largest singular vectors write, and take those vectors out.

    Parameters
    ----------
    lin
        The model at the prompt; its map to the last position is searched.
    words
        The watch list.
    k
        How many singular vectors of each token's map.
    top
        A vector is hit when one of the `top` tokens that it writes begins a watched word.
    layer
        Search the map to this layer's output, read through the final norm, and take the directions out there; None is
        the final hidden state.
    sinks
        Look at the maps of attention sinks and of a beginning token too. Their largest vector writes whatever is likely
        anywhere, and without it the model no longer writes at all.
    n_tokens
        How many next tokens to share out.
    max_new_tokens
        How much to write, with and without; less where the model's context ends.
    progress
        Is told each step.

    Returns
    -------
    tuple[Watched, Projection]
        The report, and the context manager that takes them out.

    Raises
    ------
    OptionError
        For a k or a layer that does not exist, or nothing to watch for.
    PromptError
        When no token begins any of the words.

    Notes
    -----
    Cost: the dense map, its singular vectors, and some forward passes. A vector that near-equal singular values leave
    undefined is taken as it was found.
    """
    words, k = strings("words", words), whole("k", k)
    layer = None if layer is None else whole("layer", layer)
    if not words:
        raise OptionError("watch needs at least one word")
    vocabulary = Decoder(lin.model).vocabulary
    top, n_tokens = (whole(*given, 1, vocabulary) for given in (("top", top), ("n_tokens", n_tokens)))
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    model, watched = lin.trace.model.replicate(), set(token_ids(lin.model, words))
    point = "final" if layer is None else f"resid_post.{layer}"
    J = lin.jacobian(target=point, normed=layer is not None)
    progress("singular vectors")
    svd = J.svd(k)
    gains = svd.gains(J.input)
    progress("words")
    skipped = set() if sinks else no_words(lin)
    found = [hit for hit in _hits(lin, svd.U, svd.S, gains, watched, top) if hit.token not in skipped]
    head = HeadLink(lin.trace, lin.trace.length - 1)
    parts = torch.zeros_like(lin.trace.logits(lin.trace.length - 1))
    directions = []
    for hit in found:
        u, size = svd.U[hit.token, :, hit.rank - 1], svd.S[hit.token, hit.rank - 1] * gains[hit.token, hit.rank - 1]
        directions.append(u)
        if layer is None:  # behind a layer, other blocks follow
            parts += head.jvp((size * u)[None])[0]
    progress("taking them out")
    projection = _projection(lin, directions, point, J.provenance())
    before, after = (_log_probs(model, lin.input_ids, p) for p in (None, projection))
    report = Watched(
        prompt=lin.text,
        words=words,
        hits=found,
        shares=_shares(lin, parts, before, after, watched, n_tokens),
        here=_effect([(before, after)], watched) if found else None,
        elsewhere=_effect(_elsewhere(model, projection), watched) if found else None,
        normal=None,
        without=None,
        searched=(len(lin.tokens) - len(skipped)) * k,
        settings={
            "model": model.info.to_dict(), "point": point, "k": k, "top": top, "gate": lin.gate,
            "token_ids": lin.input_ids[0].tolist(), "versions": versions(),
        },
        warnings=lin.warnings,
    )  # fmt: skip
    room = max_new_tokens if model.context_length is None else model.context_length - lin.input_ids.shape[1] + 1
    max_new_tokens = min(max_new_tokens, room)
    if found:
        progress("writing with them")
        (normal,) = write(model, [lin.input_ids], words, max_new_tokens=max_new_tokens)
        progress("writing without them")
        with projection.apply(model):
            (without,) = write(model, [lin.input_ids], words, max_new_tokens=max_new_tokens)
        report = Watched(**{**report.__dict__, "normal": normal, "without": without})
    return report, projection


def _hits(lin: Linearized, U: Tensor, S: Tensor, gains: Float[Tensor, "T k"], watched: set[int], top: int) -> list[Hit]:
    """Every vector among whose `top` words, as the token excites it, one is watched."""
    length, _, k = U.shape
    signed = (U * gains.sign().unsqueeze(1)).transpose(1, 2).reshape(length * k, -1)
    words = Decoder(lin.model).writes(signed, top)
    texts = set(lin.model.decode_each(sorted(watched)))
    hits = []
    for n, written in enumerate(words):
        token, j = divmod(n, k)
        said = [text for text, _ in written]
        matched = [text for text in said if text in texts]
        if matched:
            value, gain = S[token, j].item(), gains[token, j].item()
            hits.append(Hit(token, lin.tokens[token], j + 1, value, gain, said, matched))
    return sorted(hits, key=lambda hit: -abs(hit.value * hit.gain))


def _projection(lin: Linearized, directions: list[Tensor], point: str, provenance: Any) -> Projection:
    """The span of some directions behind the final norm; for a layer, of what the norm makes of them backwards."""
    trace, model = lin.trace, lin.model
    where = parse(point, trace.n_layers)
    module = trace.route.exit if where.layer is None else trace.layers[where.layer].block.module
    names = {part: name for name, part in trace.model.hf.named_modules()}
    width = trace.width if where.layer is not None else trace.final.shape[-1]
    rows = torch.stack(directions) if directions else trace.final.new_zeros(0, width)
    if where.layer is not None and directions:
        rows = lin.chain.norm(where, trace.length - 1).vjp(rows)
    U, S, _ = torch.linalg.svd(widened(rows.T), full_matrices=False)
    least = _DEPENDENT * S.max().item() if len(S) else 0.0
    basis = U[:, least < S]
    return Projection(
        basis=basis.contiguous(),
        module=names[module],
        model=model.info.to_dict(),
        weights=fingerprint(model.hf),
        provenance=provenance,
    )


@torch.no_grad()
def _log_probs(model: Model, ids: Tensor, projection: Projection | None) -> Float[Tensor, " V"]:
    with nullcontext() if projection is None else projection.apply(model):
        return torch.log_softmax(logits_at(model, ids, ids.shape[1] - 1).float(), dim=-1)


def _elsewhere(model: Model, projection: Projection) -> list[tuple[Tensor, Tensor]]:
    prompts = [model.encode(prompt, bos=None) for prompt in packaged_concepts().choosing]
    return [(_log_probs(model, ids, None), _log_probs(model, ids, projection)) for ids in prompts]


def _effect(pairs: list[tuple[Tensor, Tensor]], watched: set[int]) -> Effect:
    ids = torch.tensor(sorted(watched))
    before, after = (torch.stack(side) for side in zip(*pairs, strict=True))
    ids = ids.to(before.device)
    gain = after[:, ids].logsumexp(1) - before[:, ids].logsumexp(1)
    kl = (after.exp() * (after - before)).sum(1)
    return Effect(gain.mean().item(), kl.mean().item(), len(pairs))


def _shares(lin: Linearized, parts: Tensor, before: Tensor, after: Tensor, watched: set[int], n: int) -> list[Share]:
    """The n likeliest next tokens, and the three likeliest watched ones."""
    ids = sorted(watched)
    likely = before[ids].topk(min(3, len(ids))).indices.tolist()
    chosen = list(dict.fromkeys([*before.topk(n).indices.tolist(), *(ids[i] for i in likely)]))
    chosen.sort(key=lambda i: -before[i].item())
    logits = lin.trace.logits(lin.trace.length - 1)
    return [
        Share(text, before[i].exp().item(), logits[i].item(), parts[i].item(), after[i].exp().item(), i in watched)
        for i, text in zip(chosen, lin.model.decode_each(chosen), strict=True)
    ]
