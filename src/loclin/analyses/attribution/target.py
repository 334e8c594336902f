"""Attribution targets: numbers that the frozen network computes at one position, affine in its input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.sums import refuse_non_finite
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.network.ends import OutputHeadLink
from loclin.network.points import Point, parse_point
from loclin.network.units import UnitFinder

Token = str | int
"""A token's text, which must be one token, or its id."""
RIVALS = ("runner-up", "others", "mean")


@dataclass(frozen=True)
class Margin:
    """A token's logit minus those of its rivals. Probabilities depend on such differences, not on single logits.

    Parameters
    ----------
    token: the token; None for the predicted one.
    over: `"runner-up"`: minus the largest other logit. `"others"`: minus the mean of all other logits, weighted by
        their probabilities at the prompt, which are frozen; this is log(p / (1 - p)) plus the entropy of the others.
        `"mean"`: minus the plain mean of all logits. The shares of this target agree best with what removing a token
        does (see docs/faithfulness.md).
    """

    token: Token | None = None
    over: str = "runner-up"

    def __post_init__(self) -> None:
        if self.over not in RIVALS:
            raise OptionError(f"over={self.over!r}: choose one of {', '.join(RIVALS)}")


@dataclass(frozen=True)
class Neuron:
    """The activation of an MLP neuron, as it enters the down projection. Negative layers count from the end."""

    index: int
    layer: int = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """The dot product with a vector at `final`, at `logits`, or at a point on the residual stream."""

    vector: Float[Tensor, " n"]
    at: str = "final"

    __repr__ = brief


Target = Token | tuple[Token, Token] | Margin | Neuron | Direction | Tensor | np.ndarray | None
"""An attribution target: a token's logit, a logit difference, one of the classes above, or a vector at `final`.

None is the predicted token's logit minus the mean of all logits: `Margin(over="mean")`. For a classifier, tokens are
the names of classes, or their ids; None is the logit where there is one class.
"""


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
    position: int
    node: int  # where on the stream it is read (see `Point.node`)
    cotangent: Float[Tensor, "T d"]  # its gradient there
    constants: dict[str, float]  # what each bias between the stream and the target adds
    warnings: tuple[str, ...] = ()

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Describe the target with plain values for JSON."""
        names = ("kind", "tokens", "ids", "value", "size", "position")
        return {name: getattr(self, name) for name in names}


def find_token(lin: Linearized, token: Token) -> int:
    """Find the id of a token. OptionError: a text is not one token (it says how it splits), or an id is unknown."""
    model, vocabulary = lin.model, lin.trace.stock_logits.shape[0]
    if not isinstance(token, str):
        token = whole("target", token)
        if not 0 <= token < vocabulary:
            raise OptionError(f"target {token}: the model's tokens are 0 to {vocabulary - 1}; give one of them")
        return token
    if model.task == "classification":
        names = model.name_outputs(range(vocabulary))
        if names.count(token) != 1:
            raise OptionError(
                f"target {token!r}: the model's classes are {', '.join(names)}; give one of them, or its id"
            )
        return names.index(token)
    if model.tokenizer is None:
        raise OptionError(f"target {token!r}: {model.info.name} has no tokenizer; give the token's id")
    ids: list[int] = model.tokenizer(token, add_special_tokens=False)["input_ids"] if token else []
    pieces = model.decode_each(ids)
    if len(ids) == 1 and pieces == [token] and token.strip("\N{REPLACEMENT CHARACTER}"):
        return int(ids[0])
    same = model.tokens.alike(token)  # a tokenizer may encode a token's text with other tokens
    if len(same) == 1 and same[0] < vocabulary:
        return same[0]
    if same:
        some = ", ".join(map(str, same[:3])) + (" …" if len(same) > 3 else "")
        raise OptionError(f"target {token!r}: {len(same)} tokens are this text, with the ids {some}; give the id")
    if len(ids) == 1 and pieces[0].lstrip(" ") == token.lstrip(" "):
        return int(ids[0])  # the only one there is: this tokenizer has words only with a leading space
    split = " + ".join(repr(piece) for piece in pieces) or "nothing"
    counted = "not a token" if len(ids) == 1 else f"{len(ids)} tokens, not one"
    other = token[1:] if token.startswith(" ") else f" {token}"
    close = f"; {other!r}, {_describe_space(other)}, is a token" if other and model.tokens.alike(other) else ""
    raise OptionError(f"target {token!r} is {counted}: {split}{close}; give one token's text, or its id")


def _describe_space(text: str) -> str:
    return "with a space in front" if text.startswith(" ") else "without a space in front"


def _warn_of_space(lin: Linearized, at: int, token: int) -> tuple[str, ...]:
    """Warn if the predicted token differs from the target by a leading space only."""
    ((predicted, text, probability),) = lin.next_token_ids(1, position=at)
    (asked,) = lin.model.name_outputs([token])
    if token == predicted or text.lstrip(" ") != asked.lstrip(" "):
        return ()
    shown = f"{text!r}, {_describe_space(text)} (id {predicted}, {100 * probability:.1f} %)"
    return (f"The target {asked!r} is not the predicted token: that is {shown}.",)


def read_target(lin: Linearized, target: Target, position: int) -> Readout:
    """Write a target as an affine function of the residual stream.

    Cost: one forward pass for the first use of each position but the last; for a neuron, two passes of its layer.

    Raises OptionError for a text that is not one token, a layer or a neuron that does not exist, or a vector of the
    wrong length; PromptError for a position outside the prompt.
    """
    at = lin.trace.target_position(position)
    if isinstance(target, (Tensor, np.ndarray)) and target.ndim:
        target = Direction(_check_vector(torch.as_tensor(target)))
    if isinstance(target, Neuron | Direction):
        return _read_neuron(lin, target, at) if isinstance(target, Neuron) else _read_direction(lin, target, at)
    kind, ids, weights = _read_logits(lin, target, at)
    readout = _read_end(lin, weights, Point("logits"), at, kind, ids)
    return replace(readout, warnings=_warn_of_space(lin, at, ids[0]))


def describe_target(lin: Linearized, readout: Readout) -> dict[str, Any]:
    """Describe a target with plain values for JSON, with the probability of its first token."""
    if not readout.ids:
        return readout.to_dict()
    probabilities = lin.trace.logits(readout.position).double().softmax(0)
    return readout.to_dict() | {"probability": probabilities[readout.ids[0]].item()}


def _read_logits(lin: Linearized, target: Target, at: int) -> tuple[str, list[int], Tensor]:
    """Return the kind of target, its tokens, and the weight of each logit `[V]`."""
    logits = lin.trace.logits(at)
    weights = torch.zeros_like(logits)
    if isinstance(target, tuple):
        if len(target) != 2:
            raise OptionError(f"a difference has two tokens, not {len(target)}: give target=(' yes', ' no')")
        ids = [find_token(lin, token) for token in target]
        weights[ids[0]] += 1
        weights[ids[1]] -= 1
        return "logit difference", ids, weights
    only = int(logits.argmax()) if len(logits) == 1 else None
    if only is not None and isinstance(target, Margin):
        raise OptionError("the model has one class, which has no rivals: leave the target out")
    target = (Margin(over="mean") if only is None else only) if target is None else target
    if isinstance(target, (Tensor, np.ndarray)):  # a single number: an id
        target = whole("target", target)
    if not isinstance(target, str | Integral | Margin) or isinstance(target, bool):
        raise OptionError(f"target {target!r}: give a token, two of them, a direction, Margin or Neuron")
    wanted = target.token if isinstance(target, Margin) else cast("Token", target)
    chosen = int(logits.argmax()) if wanted is None else find_token(lin, wanted)
    weights[chosen] = 1
    if not isinstance(target, Margin):
        return "logit", [chosen], weights
    if target.over == "mean":
        return "logit over the mean", [chosen], weights - 1 / len(weights)
    others = logits.double().index_fill(0, torch.tensor([chosen], device=logits.device), -torch.inf)
    if target.over == "others":
        return "logit over the others", [chosen], weights - others.softmax(0).to(weights)
    rival = int(others.argmax())
    weights[rival] = -1
    return "logit margin", [chosen, rival], weights


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
        return _read_end(lin, vector, point, at, kind, [])
    value, size = _dot(vector, trace.value(point)[at])
    cotangent = torch.zeros_like(lin.embeddings)
    cotangent[at] = vector
    return Readout(kind, str(point), [], [], value, size, at, point.node(trace.n_layers), cotangent, {})


def _check_vector(vector: Tensor) -> Tensor:
    if not vector.is_floating_point():
        raise OptionError("a direction is a vector of real numbers; for a token's logit give its id as a number")
    refuse_non_finite("the direction", vector)
    return vector


def _read_end(lin: Linearized, weights: Tensor, point: Point, at: int, kind: str, ids: list[int]) -> Readout:
    """Pull a target at `final` or at the logits back through the output head and the final norm."""
    trace, chain = lin.trace, lin.chain
    value, size = _dot(weights, trace.logits(at) if point.kind == "logits" else trace.final[0, at])
    constants: dict[str, float] = {}
    u = weights
    if point.kind == "logits":
        head = OutputHeadLink(trace, at)
        constants |= {name: _dot(weights, added)[0] for name, added in head.constants().items()}
        u = head.vjp_in_parts(weights)
    norm = chain.norm(Point("final"), at)
    constants |= {name: _dot(u, added)[0] for name, added in norm.constants().items()}
    cotangent = torch.zeros_like(lin.embeddings)
    cotangent[at] = norm.vjp(u[None].to(cotangent))[0]
    texts = lin.model.name_outputs(ids)
    return Readout(kind, str(point), texts, ids, value, size, at, 2 * trace.n_layers, cotangent, constants)


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
    middle, pre, *pulled = torch.autograd.grad(
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
    return Readout(f"neuron {name}", name, [], [], value, abs(value), at, node, reads, constants)


def _dot(weights: Tensor, value: Tensor) -> tuple[float, float]:
    """Return the sum of the products, and the sum of their absolute values."""
    products = weights.double() * value.to(weights.device).double()
    return products.sum().item(), products.abs().sum().item()
