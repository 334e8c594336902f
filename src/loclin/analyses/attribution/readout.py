"""Reading a target: as an affine function of the residual stream, at one position or at several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.target import (
    SOFTMAX,
    Direction,
    Entropy,
    LogProb,
    Margin,
    Neuron,
    Probability,
    Score,
    Span,
    Target,
    describe_space,
    find_token,
    find_tokens,
)
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.sums import refuse_non_finite
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized
from loclin.models.forward import logits_at
from loclin.network.autograd import grad
from loclin.network.components import parse_component
from loclin.network.ends import OutputHeadLink
from loclin.network.points import Point, parse_point
from loclin.network.scores import AttentionScores, Side
from loclin.network.units import UnitFinder

_KINDS = {
    "logit": ("logit", "sum of logits"),
    "mean": ("logit over the mean", "sum of logits over the mean"),
    "others": ("logit over the others", "sum of logits over the others"),
    "runner-up": ("logit margin", "sum of logit margins"),
    "log-probability": ("log-probability", "log-probability"),
    "probability": ("probability", "probability"),
    "entropy": ("entropy", ""),
}
"""What each measure is called, of one token and of several."""


@dataclass(frozen=True)
class Readout:
    """A target as an affine function of the residual stream: value = sum(cotangent * stream) + sum(constants).

    `size` is the sum of the absolute values of its terms: a difference of two logits is rounded as much as they are.
    """

    kind: str  # in words
    at: str  # its point, or the name of the neuron
    tokens: list[str]  # those whose logits are part of it
    ids: list[int]
    value: float  # in the frozen network
    size: float
    positions: tuple[int, ...]  # where it is read, in order
    node: int  # where on the stream it is read (see `Point.node`)
    cotangent: Float[Tensor, "T d"]  # its gradient there
    constants: dict[str, float]  # what each bias between the stream and the target adds
    warnings: tuple[str, ...] = ()
    probability: float | None = None  # of its first token, or of all tokens of a span together
    against: dict[str, Any] | None = None  # of a difference of two spans: the other, and which tokens only it has
    read: Callable[[Float[Tensor, "n V"], Float[Tensor, "n d_final"]], float] | None = None
    """The same number of other logits and final hidden states at these positions; None where it is read elsewhere."""

    __repr__ = brief

    @property
    def position(self) -> int:
        """The last position at which it is read."""
        return self.positions[-1]

    def to_dict(self) -> dict[str, Any]:
        """Describe the target with plain values for JSON."""
        names = ("kind", "tokens", "ids", "value", "size", "position")
        found = {name: getattr(self, name) for name in names} | {"positions": list(self.positions)}
        more = {"probability": self.probability, "against": self.against}
        return found | {name: value for name, value in more.items() if value is not None}


def read_sides(lin: Linearized, target: Target, position: int) -> list[tuple[Linearized, Readout]]:
    """Read a target, as `read_target` does, or both sides of a difference of two spans. Cost: that of each side."""
    spans = _read_pair(lin, target)
    return [read_target(lin, one, position) for one in ([target] if spans is None else spans)]


def subtract(lin: Linearized, first: tuple[Linearized, Readout], second: tuple[Linearized, Readout]) -> Readout:
    """The difference of two spans that follow a prompt; what it says of the second is in `against`.

    `inputs` there are the second's own input tokens. In the positions they come behind those of the first.
    """
    (longer, one), (other, two) = first, second
    shared = lin.trace.length
    behind = longer.trace.length - shared
    against = {name: getattr(two, name) for name in ("tokens", "ids", "value", "probability")} | {
        "positions": [at + behind * (at >= shared) for at in two.positions],
        "shared": shared,
        "inputs": other.tokens[shared:],
    }
    (several,) = (names for names in _KINDS.values() if one.kind in names)
    return replace(
        one,
        kind=f"difference in {several[1]}",
        value=one.value - two.value,
        size=one.size + two.size,
        warnings=tuple(dict.fromkeys([*one.warnings, *two.warnings])),
        against=against,
        read=None,
    )


def _read_pair(lin: Linearized, target: Target) -> list[Span] | None:
    """The two spans of a difference; None for the difference of two tokens, and for all other targets."""
    if not isinstance(target, tuple) or len(target) != 2:
        return None
    pair = [one.item() if isinstance(one, Tensor | np.ndarray) and not one.ndim else one for one in target]
    if all(isinstance(one, Integral) or (isinstance(one, str) and len(find_tokens(lin, one)[0]) == 1) for one in pair):
        return None
    first, second = map(_span_of, pair)
    if first.of != second.of:
        raise OptionError(f"a difference of {first.of} and {second.of}: give both the same of=")
    return [first, second]


def _span_of(side: Any) -> Span:
    """One side of a difference as a span, of one token or of several."""
    if isinstance(side, Margin | LogProb | Probability) and side.token is not None:
        return Span(side.token if isinstance(side.token, str) else [side.token], of=_measure_of(side))
    if isinstance(side, Tensor | np.ndarray) and side.ndim == 1 and not _is_real(side):
        side = side.tolist()
    if isinstance(side, str | list):
        return Span(side)
    if isinstance(side, Integral):
        return Span([int(side)])
    if not isinstance(side, Span):
        raise OptionError(f"a difference has two answers, and {side!r} is none: give texts, ids, or loclin.Span(...)")
    return side


def read_target(lin: Linearized, target: Target, position: int) -> tuple[Linearized, Readout]:
    """Write a target as an affine function of the residual stream; of the same prompt, or of one with a span behind it.

    Cost: one forward pass for the first use of each position but the last, or for all positions of a span; for a
    neuron, two passes of its layer; for a span that is not in the prompt, `linearize` once more, and a forward pass for
    each token that is generated.

    Raises OptionError for a text that is no token, a layer or a neuron that does not exist, or a vector of the wrong
    length; PromptError for a position outside the prompt, or a span that does not fit into the model's context.
    """
    target, notes = _as_span(lin, target)
    if isinstance(target, Span):
        lin, ids, places, more = _place_span(lin, target, position)
        readout = _read_logits(lin, places, ids, target.of)
        return lin, replace(readout, warnings=(*notes, *more))
    at = lin.trace.target_position(position)
    if isinstance(target, Tensor | np.ndarray) and target.ndim:
        target = Direction(_check_vector(torch.as_tensor(target)))
    if isinstance(target, Neuron):
        return lin, _read_neuron(lin, target, at)
    if isinstance(target, Score):
        return lin, _read_score(lin, target, at)
    if isinstance(target, Direction):
        return lin, _read_direction(lin, target, at)
    if isinstance(target, tuple):
        if _read_pair(lin, target) is not None:
            raise OptionError("a difference of several tokens is for attribute alone: give two single tokens here")
        return lin, _read_difference(lin, target, at)
    token, measure = _parse(lin, target, at)
    readout = _read_logits(lin, [at], [token], measure)
    return lin, readout if measure == "entropy" else replace(readout, warnings=_warn_of_space(lin, at, token))


def _as_span(lin: Linearized, target: Target) -> tuple[Target, tuple[str, ...]]:
    """The span that a text of several tokens, a list, or a vector of ids is; other targets as they are."""
    measure = "logit"
    if isinstance(target, Margin | LogProb | Probability) and isinstance(target.token, str):
        measure = _measure_of(target)
        ids, notes = find_tokens(lin, target.token)
        return (Span(ids, of=measure), notes) if len(ids) > 1 else (replace(target, token=ids[0]), notes)
    if isinstance(target, Tensor | np.ndarray) and target.ndim == 1 and not _is_real(target):
        target = target.tolist()
    if isinstance(target, list):
        return Span([token if isinstance(token, str) else whole("target", token) for token in target]), ()
    if isinstance(target, str):
        ids, notes = find_tokens(lin, target)
        return (Span(ids) if len(ids) > 1 else ids[0]), notes
    return target, ()


def _is_real(vector: Tensor | np.ndarray) -> bool:
    return torch.as_tensor(vector).is_floating_point()


def _place_span(lin: Linearized, span: Span, position: int) -> tuple[Linearized, list[int], list[int], tuple[str, ...]]:
    """The prompt in which a span is predicted, its ids, where each of them is predicted, and warnings."""
    lin.model.refuse_other_tasks("a target of several tokens", "causal", "seq2seq")
    if position != -1:
        raise OptionError(
            "several tokens follow the end of the prompt: leave position out, or give Span(positions=...) for tokens "
            "that are in it"
        )
    if span.positions is not None:
        places = [lin.trace.position(one) for one in span.positions]
        if not places or len(set(places)) < len(places):
            raise OptionError("a span's positions: give some, each once")
        if min(places) <= lin.model.encoder_length:
            raise PromptError(f"position {min(places)}: nothing predicts the first token; give later positions")
        return lin, [int(lin.input_ids[0, one]) for one in places], [one - 1 for one in places], ()
    notes: tuple[str, ...] = ()
    if span.generated is not None:
        ids = _generate(lin, whole("generated", span.generated, 1))
    else:
        ids, notes = find_tokens(lin, cast("Any", span.tokens))
    if not ids:
        raise OptionError("a span has no tokens: give at least one")
    first = lin.trace.length - 1
    longer = lin.followed_by(*ids[:-1]) if len(ids) > 1 else lin
    return longer, ids, list(range(first, first + len(ids))), notes


def _generate(lin: Linearized, count: int) -> list[int]:
    """Write the next tokens greedily, until the model ends the text. Cost: a forward pass for each."""
    found: list[int] = []
    ids = lin.input_ids
    with torch.no_grad():
        while len(found) < count:
            token = logits_at(lin.trace.model, ids, ids.shape[1] - 1).argmax()
            found.append(int(token))
            if found[-1] in lin.model.stops:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
    return found


def _parse(lin: Linearized, target: Any, at: int) -> tuple[int, str]:
    """The token and the measure of a target at one position."""
    logits = lin.trace.logits(at)
    if isinstance(target, Entropy):
        return int(logits.argmax()), "entropy"
    only = len(logits) == 1
    if only and isinstance(target, Margin | LogProb | Probability):
        raise OptionError("the model has one class, which has no rivals: leave the target out")
    if target is None:
        target = int(logits.argmax()) if only else Margin(over="mean")
    if isinstance(target, Tensor | np.ndarray):  # a single number: an id
        target = whole("target", target)
    if isinstance(target, Margin | LogProb | Probability):
        token = target.token
        return int(logits.argmax()) if token is None else find_token(lin, token), _measure_of(target)
    if not isinstance(target, str | Integral) or isinstance(target, bool):
        raise OptionError(
            f"target {target!r}: give a token, several, a direction, or one of loclin's classes of targets"
        )
    return find_token(lin, cast("Any", target)), "logit"


def _measure_of(target: Margin | LogProb | Probability) -> str:
    if isinstance(target, Margin):
        return target.over
    return "log-probability" if isinstance(target, LogProb) else "probability"


def _read_logits(lin: Linearized, at: list[int], ids: list[int], measure: str) -> Readout:
    """Read one measure of a token, or the sum over several, each where it is predicted."""
    several = len(at) > 1
    head = OutputHeadLink(lin.trace, at if several else at[0])
    logits = head.value.reshape(len(at), -1)
    log_p = logits.double().log_softmax(1)
    spoken = log_p[range(len(at)), ids].sum().item()
    probability = math.exp(spoken) if several else logits[0].double().softmax(0)[ids[0]].item()
    found = [_weigh(row, p, token, measure) for row, p, token in zip(logits, log_p, ids, strict=True)]
    weights = torch.stack([one for one, _ in found])
    tangent: float | None = None
    if measure in ("log-probability", "probability"):
        tangent = spoken
        if measure == "probability":
            tangent = probability
            weights = weights * tangent
    elif measure == "entropy":
        tangent = -(log_p.exp() * log_p).sum().item()
    named = ids if several or measure == "entropy" else [ids[0], *(one for _, one in found if one is not None)]
    few, kind = measure in ("logit", "runner-up"), _KINDS[measure][several]
    readout = _read_end(lin, head, weights, at, kind, [] if measure == "entropy" else named, few=few)
    if tangent is not None:  # what the tangent plane has beside its slope
        offset = tangent - readout.value
        constants = readout.constants | {SOFTMAX: readout.constants.get(SOFTMAX, 0.0) + offset}
        readout = replace(readout, value=tangent, size=readout.size + abs(offset), constants=constants)
        readout = replace(readout, read=partial(_reread, ids=ids, measure=measure))
    return readout if measure == "entropy" else replace(readout, probability=probability)


def _reread(logits: Float[Tensor, "n V"], _final: Tensor, *, ids: list[int], measure: str) -> float:
    """What is not affine in the logits, of other logits."""
    log_p = logits.double().log_softmax(1)
    if measure == "entropy":
        return -(log_p.exp() * log_p).sum().item()
    spoken = log_p[range(len(ids)), ids].sum().item()
    return spoken if measure == "log-probability" else math.exp(spoken)


def _weigh(logits: Tensor, log_p: Tensor, token: int, measure: str) -> tuple[Float[Tensor, " V"], int | None]:
    """The weight of each logit in a measure of a token (without a probability's factor p), and the token's rival."""
    weights = torch.zeros_like(logits)
    if measure == "entropy":
        entropy = -(log_p.exp() * log_p).sum()
        return -(log_p.exp() * (log_p + entropy)).to(weights), None
    weights[token] = 1
    if measure == "mean":
        return weights - 1 / len(weights), None
    if measure in ("log-probability", "probability"):
        return weights - log_p.exp().to(weights), None
    others = logits.double().index_fill(0, torch.tensor([token], device=logits.device), -torch.inf)
    if measure == "others":
        return weights - others.softmax(0).to(weights), None
    if measure == "runner-up":
        rival = int(others.argmax())
        weights[rival] = -1
        return weights, rival
    return weights, None


def _read_difference(lin: Linearized, pair: tuple[Any, ...], at: int) -> Readout:
    if len(pair) != 2:
        raise OptionError(f"a difference has two tokens, not {len(pair)}: give target=(' yes', ' no')")
    ids = [find_token(lin, token) for token in pair]
    head = OutputHeadLink(lin.trace, at)
    weights = torch.zeros_like(head.value)
    weights[ids[0]] += 1
    weights[ids[1]] -= 1
    readout = _read_end(lin, head, weights[None], [at], "logit difference", ids, few=True)
    probability = head.value.double().softmax(0)[ids[0]].item()
    return replace(readout, warnings=_warn_of_space(lin, at, ids[0]), probability=probability)


def _warn_of_space(lin: Linearized, at: int, token: int) -> tuple[str, ...]:
    """Warn if the predicted token differs from the target by a leading space only."""
    ((predicted, text, probability),) = lin.next_token_ids(1, position=at)
    (asked,) = lin.model.name_outputs([token])
    if token == predicted or text.lstrip(" ") != asked.lstrip(" "):
        return ()
    shown = f"{text!r}, {describe_space(text)} (id {predicted}, {100 * probability:.1f} %)"
    return (f"The target {asked!r} is not the predicted token: that is {shown}.",)


def _read_direction(lin: Linearized, target: Direction, at: int) -> Readout:
    trace = lin.trace
    point = parse_point(target.at, trace.n_layers)
    vector = _check_vector(target.vector).to(lin.embeddings)
    if not point.on_stream:
        raise OptionError(f"a direction cannot be at {point}: choose final, logits, or a point on the residual stream")
    width = lin.chain.width(point)
    if vector.shape != (width,):
        raise OptionError(
            f"a direction at {point} has {width} numbers, not {list(vector.shape)}; give a vector of that length"
        )
    kind = f"direction at {point}"
    if point.kind in ("final", "logits"):
        head = OutputHeadLink(trace, at) if point.kind == "logits" else None
        return _read_end(lin, head, vector[None], [at], kind, [])
    value, size = _dot(vector, trace.value(point)[at])
    cotangent = torch.zeros_like(lin.embeddings)
    cotangent[at] = vector
    return Readout(kind, str(point), [], [], value, size, (at,), point.node(trace.n_layers), cotangent, {})


def _check_vector(vector: Tensor) -> Tensor:
    if not vector.is_floating_point():
        raise OptionError("a direction is a vector of real numbers; for a token's logit give its id as a number")
    refuse_non_finite("the direction", vector)
    return vector


def _read_end(
    lin: Linearized,
    head: OutputHeadLink | None,
    weights: Float[Tensor, "n width"],
    at: list[int],
    kind: str,
    ids: list[int],
    *,
    few: bool = False,
) -> Readout:
    """Pull a target at the logits of n positions, or at `final` (no head), back through the head and the final norm.

    `few`: it is a sum of one or two logits at each position, which needs no care.
    """
    trace, chain = lin.trace, lin.chain
    constants: dict[str, float] = {}
    cotangent, u = torch.zeros_like(lin.embeddings), weights
    if head is None:
        value, size = _dot(weights, trace.final[0, at])
    else:
        weights = weights.reshape(head.value.shape)
        value, size = _dot(weights, head.value)
        constants |= {name: _dot(weights, added)[0] for name, added in head.constants().items()}
        u = (head.vjp(weights[None]) if few else head.vjp_in_parts(weights)).reshape(len(at), -1)
    norm = chain.norm(Point("final"), at)
    for name, added in norm.constants().items():
        constants[name] = constants.get(name, 0.0) + _dot(u, added)[0]
    cotangent[at] = norm.vjp(u[None].to(cotangent))[0]
    texts, point = lin.model.name_outputs(ids), "final" if head is None else "logits"
    at_logits = head is not None

    def read(logits: Tensor, final: Tensor) -> float:
        return _dot(weights.reshape(len(at), -1), logits if at_logits else final)[0]

    node = 2 * trace.n_layers
    return Readout(kind, point, texts, ids, value, size, tuple(at), node, cotangent, constants, read=read)


def _read_neuron(lin: Linearized, target: Neuron, at: int) -> Readout:
    trace = lin.trace
    layer = cast("int", parse_point(f"mlp_out.{target.layer}", trace.n_layers).layer)
    trace.sublayer_path(layer, "mlp_out")
    link = lin.chain.layers[layer]
    finder = UnitFinder(link.call.block.sublayers)
    graph = link.graph(collect=True, finder=finder)
    found = finder.projection("mlp_out", graph.points["mlp_out"], graph.constants)
    if found is None:
        raise OptionError(
            f"layer {layer}: {finder.why_no_projection('mlp_out')}; choose another layer, or another target"
        )
    if not -found.count <= (index := whole("neuron", target.index)) < found.count:
        raise OptionError(f"neuron {index}: layer {layer} has neurons 0 to {found.count - 1}; choose one of them")
    index %= found.count
    activation = found.source.reshape(trace.length, found.count)[at, index]
    leaves = [leaf for _, leaf in graph.constants]
    middle, pre, *pulled = grad(
        activation, [graph.attn_shift, graph.points["resid_pre"], *leaves], retain_graph=True, allow_unused=True
    )
    constants: dict[str, float] = {}
    for (name, leaf), moved in zip(graph.constants, pulled, strict=True):
        if moved is not None and (middle is None or graph.is_behind_attention(leaf)):
            constants[name] = constants.get(name, 0.0) + _dot(moved, leaf.detach())[0]
    # an MLP beside the attention reads the layer's input
    cotangent, node = (pre, 2 * layer) if middle is None else (middle, 2 * layer + 1)
    name, value = f"L{layer}N{index}", activation.detach().double().item()
    reads = cotangent[0].to(lin.embeddings)
    return Readout(f"neuron {name}", name, [], [], value, abs(value), (at,), node, reads, constants)


def open_scores(lin: Linearized, head: str, position: int) -> AttentionScores:
    """The attention scores of a head, by its name, for the query at a position; OptionError for no head."""
    if not isinstance(head, str) or (named := parse_component(head, lin.trace)).head is None or named.at is not None:
        raise OptionError(f"head {head!r}: write L3H5 for query head 5 of layer 3")
    return AttentionScores(lin.chain.layers[named.layer], named.head, position)


def find_key(lin: Linearized, scores: AttentionScores, key: int | None) -> int:
    """The position of a key; by default the most attended to that stands for a word, or at all."""
    if key is not None:
        return lin.trace.position(key)
    words = scores.pattern.clone()
    words[lin.non_words] = 0
    return int((words if words.any() else scores.pattern).argmax())


def _read_score(lin: Linearized, target: Score, at: int) -> Readout:
    scores = open_scores(lin, target.head, at)
    key = find_key(lin, scores, target.key)
    value, found = scores.value(key), scores.read(cast("Side", target.side), key)
    ids = [int(lin.input_ids[0, one]) for one in (at, key)]
    return Readout(
        kind=f"score of {scores.name} by its {target.side}",
        at=scores.name,
        tokens=[lin.tokens[one] for one in (at, key)],
        ids=ids,
        value=value,
        size=found.size,
        positions=(at if target.side == "query" else key,),
        node=2 * scores.layer,
        cotangent=found.cotangent.to(lin.embeddings),
        constants=found.constants,
    )


def _dot(weights: Tensor, value: Tensor) -> tuple[float, float]:
    """Return the sum of the products, and the sum of their absolute values."""
    products = weights.double() * value.to(weights.device).double()
    return products.sum().item(), products.abs().sum().item()
