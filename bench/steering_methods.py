"""What `bench/steering.py` steers with: the operator, its variants, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

import loclin
from loclin import steering as s
from loclin.linearization import Linearization
from loclin.models import Model
from loclin.steering.concepts import Concept, packaged_concepts, token_ids

RANK = 8


class Case:
    """One concept and one model, and everything that is made of them once."""

    def __init__(self, model: Model, concept: Concept, neutral: dict[str, Linearization]) -> None:
        self.model, self.concept = model, concept
        self.ids = token_ids(model, concept.words)
        self._lins: dict[str, Linearization] = {}
        self._neutral = neutral

    def lin(self, text: str) -> Linearization:
        """The model at a text."""
        held = self._neutral if text in packaged_concepts().neutral else self._lins
        if text not in held:
            held[text] = loclin.linearize(self.model, text, bos=True)
        return held[text]

    def forget(self) -> None:
        """Let go of the concept's own texts and their maps; the neutral ones are every case's."""
        self._lins.clear()
        self.__dict__.pop("own", None)

    @cached_property
    def own(self) -> Linearization:
        """The model at the concept's first text."""
        return self.lin(self.concept.texts[0])

    def shuffled(self) -> list[int]:
        """Another order of that text's tokens."""
        order = torch.randperm(len(self.own.tokens), generator=torch.Generator().manual_seed(0)).tolist()
        return order if order != sorted(order) else order[::-1]


def point(layer: int) -> str:
    return f"resid_post.{layer}"


def _differences(case: Case, layer: int, last: bool = False) -> s.Vector:
    texts, others = case.concept.texts, packaged_concepts().neutral
    return s.mean_difference(case.model, texts, others, point(layer), last=last, bos=True)


def _merged(case: Case, layer: int) -> s.Operator:
    return s.merge([s.Operator.make(case.lin(text), layer) for text in case.concept.texts[:2]])


def _less_neutral(case: Case, layer: int) -> s.Operator:
    neutral = s.Operator.make(case.lin(packaged_concepts().neutral[0]), layer)
    return s.merge([s.Operator.make(case.own, layer), neutral], [1.0, -1.0])


def _suffix_of_others(case: Case, layer: int) -> s.Vector:
    """The suffix maps of neutral texts instead of the steering text's own, averaged."""
    found = [s.pullback(case.lin(text), point(layer), case.ids) for text in packaged_concepts().neutral[:4]]
    return replace(found[0], direction=torch.stack([vector.direction for vector in found]).mean(0))


METHODS: dict[str, Callable[[Case, int], s.Steering]] = {
    "operator (published)": lambda c, layer: s.Operator.make(c.own, layer, at="published"),
    "operator": lambda c, layer: s.Operator.make(c.own, layer),
    "operator, first token left alone": lambda c, layer: s.Operator.make(c.own, layer, spare_first=True),
    "operator, final norm on": lambda c, layer: s.Operator.make(c.own, layer, normed=True),
    "operator, shuffled over tokens": lambda c, layer: s.Operator.make(c.own, layer, positions=c.shuffled()),
    "operator, without the sink's map": lambda c, layer: s.Operator.make(c.own, layer, positions="words"),
    "operator, rank 8": lambda c, layer: s.Operator.make(c.own, layer, positions="words", rank=RANK),
    "operator, rank 8, signs fixed": lambda c, layer: s.Operator.make(
        c.own, layer, positions="words", rank=RANK, signs="fixed"
    ),
    "operator, nearest token": lambda c, layer: s.Operator.make(c.own, layer, align="nearest"),
    "operator, last token's map alone": lambda c, layer: s.Operator.make(c.own, layer, positions=[-1]),
    "operator, less a neutral text's": _less_neutral,
    "operator, 2 texts": _merged,
    "output basis, rank 8": lambda c, layer: s.output_basis(c.own, point(layer), RANK),
    "suffix map": lambda c, layer: s.pullback(c.own, point(layer), c.ids),
    "suffix map of 4 neutral texts": _suffix_of_others,
    "activation addition": lambda c, layer: s.activation_addition(c.own, point(layer)),
    "mean difference": _differences,
    "mean difference, last tokens": lambda c, layer: _differences(c, layer, last=True),
    "contrast vector": lambda c, layer: s.contrast(
        c.model, packaged_concepts().pairs(c.concept.phrase), point(layer), bos=True
    ),
    "random direction": lambda c, layer: s.random_direction(c.model, point(layer)),
}
BASELINE = "mean difference"
INTERPOLATED, SEVERAL = "operator, interpolated (eq. 16)", "operator, three layers"
CHOSEN = (
    "operator",
    "operator (published)",
    "operator, less a neutral text's",
    "output basis, rank 8",
    "suffix map",
    "suffix map of 4 neutral texts",
    "activation addition",
    "mean difference",
    "mean difference, last tokens",
    "contrast vector",
    "random direction",
)
"""Methods that have a layer chosen; the variants of "operator", the first, take its layer."""
EXPLAINED = ("operator (published)", "operator")
"""Those of which is measured what they add."""
MAPPED = (*EXPLAINED, BASELINE)
"""Those that have a map of strength by layer."""
SHARES = (0.97, 0.9, 0.8, 0.65, 0.5, 0.3)
ALL = (*METHODS, INTERPOLATED, SEVERAL)
GENERATED = (
    *EXPLAINED,
    "operator, less a neutral text's",
    "output basis, rank 8",
    "suffix map of 4 neutral texts",
    "activation addition",
    "mean difference",
)
