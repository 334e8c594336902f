"""The methods that `steer` chooses from, and the concept words of some texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loclin.common.brief import brief
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.steering.base import Steering
from loclin.steering.concepts import packaged_concepts, words_of
from loclin.steering.operator import At, Operator, merge
from loclin.steering.vector import activation_addition, mean_difference, output_basis, pullback, random_direction

Method = Literal["operator", "published", "basis", "suffix", "activation", "mean", "random"]
METHODS: dict[Method, str] = {
    "operator": "the text's map to a layer's output, applied to the new tokens, and added there",
    "published": "that map followed by the final norm, added at the layer's input, as the paper's author does",
    "basis": "the text's hidden state in the largest output directions of its map",
    "suffix": "the map from the layer to the logits, transposed, at the words",
    "activation": "the text's hidden state at its last token",
    "mean": "the mean hidden state of the texts minus that of neutral texts",
    "random": "a random direction of the same norm",
}
"""The methods of `steer`, and what each of them adds to hidden states."""


@dataclass(frozen=True)
class Source:
    """What a steering is made from; the options are those of `steer`."""

    model: Model
    method: Method
    lins: list[Linearized]  # the model at each steering text
    toward: list[str]  # the steering texts
    ids: list[int]  # the tokens that begin the concept's words, for "suffix"
    rank: int | None
    normed: bool
    bos: bool | None

    __repr__ = brief


def make_steering(source: Source, layer: int) -> Steering:
    """Make what a method steers with at one layer."""
    point, lins, method = f"resid_post.{layer}", source.lins, source.method
    if method in ("operator", "published"):
        at: At = "published" if method == "published" else "output"
        return merge([Operator.make(lin, layer, at=at, rank=source.rank, normed=source.normed) for lin in lins])
    if method == "mean":
        return mean_difference(source.model, source.toward, packaged_concepts().neutral, point, bos=source.bos)
    if method == "random":
        return random_direction(source.model, point)
    if len(lins) > 1:
        raise OptionError(f"method={method!r} takes one text; 'operator', 'published' and 'mean' take several")
    if method == "basis":
        return output_basis(lins[0], point, source.rank or 8)
    return pullback(lins[0], point, source.ids) if method == "suffix" else activation_addition(lins[0], point)


def find_concept_words(toward: Sequence[str], lins: Sequence[Linearized]) -> list[str]:
    """Find the words of some texts, and what the model predicts after each text, if that is a word."""
    predicted = [text.strip() for lin in lins for text, _ in lin.next_tokens(1) if text.startswith(" ")]
    found = list(dict.fromkeys(word for text in (*toward, *predicted) for word in words_of(text)))
    if not found:
        raise PromptError("the text has no words that mean something by themselves; give some with words=")
    return found
