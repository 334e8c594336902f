"""What can be shared out: numbers that the frozen network computes at one position, affine in its input."""

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
from loclin.common.sums import refuse_broken
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.network.link import HeadLink, behind_attention
from loclin.network.points import Point, parse
from loclin.network.units import Inside

Token = str | int
"""A token's text, which must be one token, or its id."""
RIVALS = ("runner-up", "others", "mean")


@dataclass(frozen=True)
class Margin:
    """A token's logit over those of its rivals: what a probability depends on, and a logit alone does not.

    Parameters
    ----------
    token
        The token; None for the predicted one.
    over
        `"runner-up"`: minus the largest other logit. `"others"`: minus the mean of all other logits, weighted by their
        probabilities at the prompt, which are held. This is log(p / (1 - p)) plus the entropy of the others. `"mean"`:
        minus the plain mean of all logits, which no probability depends on; of all targets its shares agree best with
        what removing a token does (see docs/faithfulness.md).
    """

    token: Token | None = None
    over: str = "runner-up"

    def __post_init__(self) -> None:
        if self.over not in RIVALS:
            raise OptionError(f"over={self.over!r}: choose one of {', '.join(RIVALS)}")


@dataclass(frozen=True)
class Neuron:
    """The activation of an MLP's neuron: its frozen linear branch times what is held. Negative layers count back."""

    index: int
    layer: int = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """The product with a vector at `final`, `logits`, or a point on the residual stream."""

    vector: Float[Tensor, " n"]
    at: str = "final"

    __repr__ = brief


Target = Token | tuple[Token, Token] | Margin | Neuron | Direction | Tensor | np.ndarray | None
"""What can be asked for: a token's logit, a difference of two, or one of the classes.

None is the predicted token's logit over the mean of all: `Margin(over="mean")`.
"""


@dataclass(frozen=True)
class Reading:
    """How a target reads the residual stream: value = sum of cotangent * stream + constants.

    Attributes
    ----------
    kind
        What it is, in words.
    at
        The point where it is, or the neuron.
    tokens, ids
        The tokens whose logits it is made of.
    value, size
        The frozen network's own value of it, and the summed sizes of the numbers that it is made of: the
        difference of two logits is rounded like the logits.
    position
        The position it is read at.
    node
        Where on the stream it is read (see `Point.node`).
    cotangent
        What it multiplies the stream with `[T, d]`.
    constants
        What each bias between the stream and the target adds.
    warnings
        What a reader should know of the tokens: that the predicted one is another by a space only.
    """

    kind: str
    at: str
    tokens: list[str]
    ids: list[int]
    value: float
    size: float
    position: int
    node: int
    cotangent: Float[Tensor, "T d"]
    constants: dict[str, float]
    warnings: tuple[str, ...] = ()

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """What it is, as plain values for JSON."""
        names = ("kind", "tokens", "ids", "value", "size", "position")
        return {name: getattr(self, name) for name in names}


def token_id(lin: Linearized, token: Token) -> int:
    """The id of a token given by text or id.

    Raises
    ------
    OptionError
        When the text is not one token, saying how it splits; when there is no such id.
    """
    model = lin.model
    vocabulary = lin.trace.stock_logits.shape[0]
    if not isinstance(token, str):
        token = whole("target", token)
        if not 0 <= token < vocabulary:
            raise OptionError(f"target {token}: the model's tokens are 0 to {vocabulary - 1}")
        return token
    if model.tokenizer is None:
        raise OptionError(f"target {token!r}: {model.info.name} has no tokenizer; give the token's id")
    ids: list[int] = model.tokenizer(token, add_special_tokens=False)["input_ids"] if token else []
    pieces = model.decode_each(ids)
    if len(ids) == 1 and pieces == [token] and token.strip("\N{REPLACEMENT CHARACTER}"):
        return int(ids[0])
    same = model.tokens.alike(token)  # no tokenizer writes every token's text with that token
    if len(same) == 1 and same[0] < vocabulary:
        return same[0]
    if same:
        some = ", ".join(map(str, same[:3])) + (" …" if len(same) > 3 else "")
        raise OptionError(f"target {token!r}: {len(same)} tokens are this text, with the ids {some}. Give the id")
    if len(ids) == 1 and pieces[0].lstrip(" ") == token.lstrip(" "):
        return int(ids[0])  # the only one there is: its tokenizer has words with their spaces alone
    split = " + ".join(repr(piece) for piece in pieces) or "nothing"
    counted = "not a token" if len(ids) == 1 else f"{len(ids)} tokens, not one"
    other = token[1:] if token.startswith(" ") else f" {token}"
    close = f"; {other!r}, {_spaced(other)}, is a token" if other and model.tokens.alike(other) else ""
    raise OptionError(f"target {token!r} is {counted}: {split}{close}. Give one token's text, or its id")


def _spaced(text: str) -> str:
    return "with a space in front" if text.startswith(" ") else "without a space in front"


def _space_warning(lin: Linearized, at: int, token: int) -> tuple[str, ...]:
    """Say so where the predicted token is the one asked for but for a space in front."""
    ((predicted, text, probability),) = lin.next_token_ids(1, at)
    (asked,) = lin.model.decode_each([token])
    if token == predicted or text.lstrip(" ") != asked.lstrip(" "):
        return ()
    return (
        f"The target {asked!r} is not the predicted token: that is {text!r}, {_spaced(text)} "
        f"(id {predicted}, {100 * probability:.1f} %).",
    )


def read(lin: Linearized, target: Target, position: int) -> Reading:
    """Find what a target reads of the residual stream.

    Cost: a forward pass the first time that another position than the last is asked for; for a neuron, two of its
    layer.

    Raises
    ------
    OptionError
        For a token that is not one, a layer or a neuron that does not exist, a vector of the wrong length.
    PromptError
        For a position outside the prompt.
    """
    at = lin.trace.position(position)
    if isinstance(target, (Tensor, np.ndarray)) and target.ndim:
        target = Direction(_real_vector(torch.as_tensor(target)))
    if isinstance(target, Neuron):
        return _neuron(lin, target, at)
    if isinstance(target, Direction):
        return _direction(lin, target, at)
    kind, ids, weights = _logits(lin, target, at)
    reading = _ends(lin, weights, Point("logits"), at, kind, ids)
    return replace(reading, warnings=_space_warning(lin, at, ids[0]))


def described(lin: Linearized, reading: Reading) -> dict[str, Any]:
    """What a reading is, as plain values for JSON, with the probability of its first token."""
    about = reading.to_dict()
    if reading.ids:
        about["probability"] = lin.trace.logits(reading.position).double().softmax(0)[reading.ids[0]].item()
    return about


def _logits(lin: Linearized, target: Target, at: int) -> tuple[str, list[int], Tensor]:
    """(what, which tokens, the weight of each logit)."""
    logits = lin.trace.logits(at)
    weights = torch.zeros_like(logits)
    if isinstance(target, tuple):
        if len(target) != 2:
            raise OptionError(f"a difference has two tokens, not {len(target)}: target=(' yes', ' no')")
        ids = [token_id(lin, token) for token in target]
        weights[ids[0]] += 1
        weights[ids[1]] -= 1
        return "logit difference", ids, weights
    target = Margin(over="mean") if target is None else target
    if isinstance(target, (Tensor, np.ndarray)):  # a single number: an id
        target = whole("target", target)
    if not isinstance(target, str | Integral | Margin) or isinstance(target, bool):
        raise OptionError(f"target {target!r}: give a token, two of them, a direction, Margin or Neuron")
    wanted = target.token if isinstance(target, Margin) else cast("Token", target)
    chosen = int(logits.argmax()) if wanted is None else token_id(lin, wanted)
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


def _direction(lin: Linearized, target: Direction, at: int) -> Reading:
    trace = lin.trace
    point = parse(target.at, trace.n_layers)
    vector = _real_vector(target.vector).to(lin.embeddings)
    if not point.on_stream:
        raise OptionError(f"a direction at {point}: choose final, logits, or a point on the residual stream")
    width = lin.chain.width(point)
    if vector.shape != (width,):
        raise OptionError(f"a direction at {point} has {width} numbers, not {list(vector.shape)}")
    kind = f"direction at {point}"
    if point.kind in ("final", "logits"):
        return _ends(lin, vector, point, at, kind, [])
    value, size = _sums(vector, trace.value(point)[at])
    cotangent = torch.zeros_like(lin.embeddings)
    cotangent[at] = vector
    return Reading(kind, str(point), [], [], value, size, at, point.node(trace.n_layers), cotangent, {})


def _real_vector(vector: Tensor) -> Tensor:
    if not vector.is_floating_point():
        raise OptionError("a direction is a vector of real numbers; for a token's logit give its id as a number")
    refuse_broken("the direction", vector)
    return vector


def _ends(lin: Linearized, weights: Tensor, point: Point, at: int, kind: str, ids: list[int]) -> Reading:
    """A reading of `final` or of the logits: through the head and the final norm."""
    trace, chain = lin.trace, lin.chain
    value, size = _sums(weights, trace.logits(at) if point.kind == "logits" else trace.final[0, at])
    constants: dict[str, float] = {}
    u = weights
    if point.kind == "logits":
        head = HeadLink(trace, at)
        constants |= {name: _sums(weights, added)[0] for name, added in head.constants().items()}
        u = head.vjp_in_parts(weights)
    norm = chain.norm(Point("final"), at)
    constants |= {name: _sums(u, added)[0] for name, added in norm.constants().items()}
    cotangent = torch.zeros_like(lin.embeddings)
    cotangent[at] = norm.vjp(u[None].to(cotangent))[0]
    texts = lin.model.decode_each(ids)
    return Reading(kind, str(point), texts, ids, value, size, at, 2 * trace.n_layers, cotangent, constants)


def _neuron(lin: Linearized, target: Neuron, at: int) -> Reading:
    trace = lin.trace
    layer = cast("int", parse(f"mlp_out.{target.layer}", trace.n_layers).layer)
    trace.part(layer, "mlp_out")
    link = lin.chain.layers[layer]
    inside = Inside(link.call.block.parts)
    graph = link.graph(collect=True, inside=inside)
    found = inside.projection("mlp_out", graph.points["mlp_out"], graph.constants)
    if found is None:
        raise OptionError(f"layer {layer}: {inside.why_whole('mlp_out')}")
    if not -found.count <= (index := whole("neuron", target.index)) < found.count:
        raise OptionError(f"neuron {index}: layer {layer} has neurons 0 to {found.count - 1}")
    index %= found.count
    activation = found.source.reshape(trace.length, found.count)[at, index]
    leaves = [leaf for _, leaf in graph.constants]
    middle, pre, *pulled = torch.autograd.grad(
        activation, [graph.attn_shift, graph.points["resid_pre"], *leaves], retain_graph=True, allow_unused=True
    )
    constants: dict[str, float] = {}
    for (name, leaf), moved in zip(graph.constants, pulled, strict=True):
        if moved is not None and (middle is None or behind_attention(graph, leaf)):
            constants[name] = constants.get(name, 0.0) + _sums(moved, leaf.detach())[0]
    # beside the attention, an MLP reads what enters the layer
    cotangent, node = (pre, 2 * layer) if middle is None else (middle, 2 * layer + 1)
    name, value = f"L{layer}N{index}", activation.detach().double().item()
    reads = cotangent[0].to(lin.embeddings)
    return Reading(f"neuron {name}", name, [], [], value, abs(value), at, node, reads, constants)


def _sums(weights: Tensor, value: Tensor) -> tuple[float, float]:
    """The sum of the products, and of their sizes."""
    products = weights.double() * value.to(weights.device).double()
    return products.sum().item(), products.abs().sum().item()
