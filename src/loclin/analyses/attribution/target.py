"""Attribution targets: numbers that the frozen network computes at one position or at several, affine in its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.models import Model

Token = str | int
"""A token's text, which must be one token, or its id."""
SIDES = ("query", "key")
"""What of an attention score is live: see `Score`."""
RIVALS = ("runner-up", "others", "mean")
MEASURES = ("logit", *RIVALS, "log-probability", "probability")
"""What can be taken of a token: its logit, its logit minus those of rivals (see `Margin`), or its probability."""
SOFTMAX = "softmax"
"""The constant of a target that is only tangent to what it is named after: see `LogProb`."""


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
class LogProb:
    """A token's log-probability log p. None is the predicted token.

    It is not affine in the logits z, but its gradient there is e_token - p. So the shares are those of
    (e_token - p) . z, with the probabilities p at the prompt frozen, which is log p plus the entropy of p; minus that
    entropy is the constant `softmax` among the biases. All shares sum to log p.
    """

    token: Token | None = None


@dataclass(frozen=True)
class Probability:
    """A token's probability p, to first order: the gradient p (e_token - p) at the prompt, and a constant `softmax`."""

    token: Token | None = None


@dataclass(frozen=True)
class Entropy:
    """The entropy of the prediction in nats, to first order: its gradient at the prompt, and a constant `softmax`."""


@dataclass(frozen=True)
class Span:
    """Several tokens in a row: the sum of their logits, log-probabilities or margins, each where it is predicted.

    Parameters
    ----------
    tokens: a text, or tokens, that follow the prompt. The prompt is linearized again with all but the last of them
        behind it, and these are input tokens of the map.
    positions: instead, the prompt's own tokens at these positions. Each is predicted at the position before.
    generated: instead, so many tokens that the model itself writes next, at most (greedily, until the text ends).
    of: what is summed, one of `MEASURES`.
    """

    tokens: str | Sequence[Token] | None = None
    positions: Sequence[int] | None = None
    generated: int | None = None
    of: str = "logit"

    __repr__ = brief

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.tokens, self.positions, self.generated)) != 1:
            raise OptionError("a span is given by its tokens, by positions in the prompt, or by how many are generated")
        if self.of not in MEASURES:
            raise OptionError(f"of={self.of!r}: choose one of {', '.join(MEASURES)}")


@dataclass(frozen=True)
class Neuron:
    """The activation of an MLP neuron, as it enters the down projection. Negative layers count from the end."""

    index: int
    layer: int = -1


@dataclass(frozen=True)
class Score:
    """The attention score of a query head: the number for a query and a key that its softmax takes.

    It is linear in what the query reads while the key is held, and in what the key reads while the query is held. The
    query is at the `position` at which the target is read.

    Parameters
    ----------
    head: its name, `L3H5`.
    key: the key's position; None: the one to which the query attends most, attention sinks and the beginning token
        aside.
    side: whose reading is shared out: `"query"` or `"key"`.
    """

    head: str
    key: int | None = None
    side: str = "query"

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise OptionError(f"side={self.side!r}: choose one of {', '.join(SIDES)}")


@dataclass(frozen=True, eq=False)
class Direction:
    """The dot product with a vector at `final`, at `logits`, or at a point on the residual stream."""

    vector: Float[Tensor, " n"]
    at: str = "final"

    __repr__ = brief


Answer = Token | list[Token] | Margin | LogProb | Probability | Span | Tensor | np.ndarray
"""One side of a difference: a token, or several."""
Target = Answer | tuple[Answer, Answer] | Entropy | Neuron | Score | Direction | None
"""An attribution target: a token's logit, a difference, one of the classes above, or a vector at `final`.

A text of several tokens, or a list of tokens or ids, is a `Span`. None is the predicted token's logit minus the mean of
all logits: `Margin(over="mean")`. For a classifier, tokens are the names of classes, or their ids; None is the logit
where there is one class.
"""


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
    counted = "not a token" if len(ids) == 1 else f"{len(ids)} tokens, not one"
    split = f"{describe_split(pieces)}{_describe_other(model, token)}"
    raise OptionError(f"target {token!r} is {counted}: {split}; give one token's text, or its id")


def find_tokens(lin: Linearized, tokens: str | Sequence[Token]) -> tuple[list[int], tuple[str, ...]]:
    """Find the ids of a text of one or more tokens, or of each of a list; and warnings about how the text splits.

    Raises OptionError as `find_token` does, but for a text of several tokens.
    """
    if not isinstance(tokens, str):
        return [find_token(lin, token) for token in tokens], ()
    model, tokenizer = lin.model, lin.model.tokenizer
    ids: list[int] = []
    if tokens and tokenizer is not None and model.task != "classification":
        ids = list(tokenizer(tokens, add_special_tokens=False)["input_ids"])
    if tokenizer is None or len(ids) < 2 or tokenizer.unk_token_id in ids or model.tokens.alike(tokens):
        return [find_token(lin, tokens)], ()
    pieces = model.decode_each(ids)
    notes = [f"The target {tokens!r} is {len(ids)} tokens: {describe_split(pieces)}{_describe_other(model, tokens)}."]
    before = lin.input_ids[0, model.encoder_length :].tolist()
    whole_text = model.tokens.text(before, special=False) + tokens
    joint: list[int] = tokenizer(whole_text, add_special_tokens=False, verbose=False)["input_ids"]
    if joint[-len(ids) :] != ids:
        split = describe_split(model.decode_each(joint[-len(ids) - 1 :]))
        notes.append(f"Behind this prompt the tokenizer itself would split it otherwise: … {split}.")
    return ids, tuple(notes)


def describe_split(pieces: Sequence[str]) -> str:
    """Write tokens one by one."""
    return " + ".join(repr(piece) for piece in pieces) or "nothing"


def _describe_other(model: Model, text: str) -> str:
    """Name the token that a text would be with or without a space in front."""
    other = text[1:] if text.startswith(" ") else f" {text}"
    return f"; {other!r}, {describe_space(other)}, is a token" if other and model.tokens.alike(other) else ""


def describe_space(text: str) -> str:
    """Say whether a text begins with a space."""
    return "with a space in front" if text.startswith(" ") else "without a space in front"
