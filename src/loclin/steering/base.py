"""What all kinds of steering share: where they act, on which model, and how strongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import real
from loclin.errors import OptionError, SteeringError
from loclin.models import Model, wrap
from loclin.network.anatomy import anatomy
from loclin.network.points import Point, parse
from loclin.results.result import Result
from loclin.steering.form import NEUTRAL, Form
from loclin.steering.hooks import Hooks
from loclin.steering.match import check_model


def site(model: Model, point: str | Point) -> Point:
    """Read the point that is steered: `resid_pre.L` (a layer's input) or `resid_post.L` (its output).

    Raises
    ------
    OptionError
        When the model has no such point.
    """
    found = parse(point, len(anatomy(model.hf).layers))
    if found.kind not in ("resid_pre", "resid_post"):
        raise OptionError(f"steering acts on a layer's input or output, resid_pre.L or resid_post.L, not on {found}")
    return found


class Steering(Result, ABC):
    """Something that gives a direction S_p for every position p of whatever the model reads and writes.

    Attributes
    ----------
    point
        Where it acts: `resid_pre.L` or `resid_post.L`.
    model
        The model it was made with, as in `ModelInfo.to_dict`.
    weights
        A fingerprint of that model's weights.
    spare_first
        Whether every text's first token is left as it is: it is the attention sink, whose hidden state is many times
        longer than others', so that a direction of half its length is not a nudge.
    """

    point: str
    spare_first: bool
    model: dict[str, Any]
    weights: str

    @property
    @abstractmethod
    def accumulates(self) -> bool:
        """Whether S_p is a sum over the tokens up to p; otherwise it is the same everywhere."""

    @abstractmethod
    def to(self, device: torch.device) -> Steering:
        """The same on a device."""

    @abstractmethod
    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """What tokens with embeddings x, at positions `index` of their texts, add to S; a constant S's own value."""

    @property
    @abstractmethod
    def gates(self) -> set[str]:
        """The gate splits of the maps it was made of."""

    @contextmanager
    def apply(
        self,
        model: Model | nn.Module,
        strength: float | Sequence[float],
        form: Form = "add",
        *,
        gate: str | None = None,
    ) -> Iterator[None]:
        """Steer a model inside a `with`: whatever runs it there, `model.hf.generate` above all, is steered.

        The model is the user's own, with hooks on two layers, which are taken off at the end, also after an error.
        Prompts may be batches with padding; key-value caches must begin inside. Sampling, beams and streamers work.

        Parameters
        ----------
        model
            The model that this was made with.
        strength
            Lambda; or one for each text of a batch. For "add" 0 is unsteered, for "interpolate" 1 is; then nothing is
            touched, and the model gives the very same bits.
        form
            "add": h + lambda |h| / (2 |S|) S, the norm-matched addition of the paper's author.
            "interpolate": lambda h + (1 - lambda) S, the paper's equation 16.
        gate
            Refuse maps that were made with another gate split.

        Raises
        ------
        SteeringError
            When this was made with another model, revision, dtype or gate; inside, when values are no longer finite,
            a cache holds tokens that were not seen here, or a batch has not as many texts as there are strengths.
        OptionError
            For a form that does not exist or a strength that is not a number.

        Notes
        -----
        Cost per token: one d x d (or rank k) product for every text that was merged, and nothing else that grows.
        """
        model = model if isinstance(model, Model) else wrap(model)
        if form not in get_args(Form):
            raise OptionError(f"form={form!r}: choose {' or '.join(get_args(Form))}")
        given = strength if isinstance(strength, Sequence) else [strength]
        strengths = [real("strength", one) for one in given]
        if not strengths:
            raise OptionError("strength=[]: give a finite number, or one for each text")
        self.check(model, gate)
        if set(strengths) == {NEUTRAL[form]}:
            yield
            return
        with Hooks(self.to(model.device), model, strengths, form).installed(site(model, self.point)):
            yield

    def check(self, model: Model, gate: str | None = None) -> None:
        """Refuse a model that this was not made with, and a gate split that its maps do not have.

        Raises
        ------
        SteeringError
            Saying what differs.
        """
        check_model(type(self).__name__.lower(), self.model, self.weights, model)
        if gate is not None and self.gates - {gate}:
            held = ", ".join(sorted(self.gates))
            raise SteeringError(f"the operator's maps hold gate={held!r}, not {gate!r}; make it anew with that split")
