"""The base class of all steering: where it acts, on which model, and how strongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import real
from loclin.errors import OptionError, SteeringError
from loclin.models import Model, wrap
from loclin.network.anatomy import find_anatomy
from loclin.network.points import Point, parse_point
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.steering.form import NEUTRAL, Form
from loclin.steering.hooks import Hooks
from loclin.steering.match import check_model


def site(model: Model, point: str | Point) -> Point:
    """Parse the point that is steered: `resid_pre.L` (a layer's input) or `resid_post.L` (its output)."""
    model.refuse_other_tasks("steering", "causal")
    found = parse_point(point, len(find_anatomy(model.hf).layers))
    if found.kind not in ("resid_pre", "resid_post"):
        raise OptionError(
            f"steering cannot act on {found}: choose a layer's input or output, resid_pre.L or resid_post.L"
        )
    return found


class Steering(Result, ABC):
    """A direction S_p for every position p of the texts that the model reads and writes.

    Attributes
    ----------
    point: where it acts, `resid_pre.L` or `resid_post.L`.
    model, weights: the model it was made with, as in `ModelInfo.to_dict`, and a fingerprint of its weights.
    spare_first: leave the first token of every text unchanged. It is the attention sink: its hidden state is many
        times longer than others, so that adding half its norm is a large change.
    accumulates: S_p is a sum over the tokens up to p; otherwise it is the same at every position.
    """

    point: str
    spare_first: bool
    model: dict[str, Any]
    weights: str
    provenance: Provenance | None
    accumulates: ClassVar[bool]

    def to(self, device: torch.device) -> Steering:
        """Copy it to a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        made: Steering = replace(cast("Any", self), **moved)
        return made

    @abstractmethod
    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Compute what tokens with embeddings x, at positions `index` of their texts, add to S, or a constant S."""

    @property
    def gates(self) -> set[str]:
        """The gate splits of the maps it was made from, if any."""
        return set() if self.provenance is None else {self.provenance.gate}

    @contextmanager
    def apply(
        self,
        model: Model | nn.Module,
        strength: float | Sequence[float],
        form: Form = "add",
        *,
        gate: str | None = None,
    ) -> Iterator[None]:
        """Steer a model inside a `with`: every forward pass there is steered, such as those of `model.hf.generate`.

        The model gets hooks on two layers, which are removed at the end, also after an error. Prompts may be padded
        batches. Key-value caches must be empty at the beginning. Sampling, beam search and streamers work. Cost per
        token: one d x d (or rank k) product for every merged text.

        Parameters
        ----------
        strength
            Lambda; one number, or one for each text of a batch. 0 ("add") and 1 ("interpolate") are unsteered: the
            model gets no hooks, and its outputs are bit-identical.
        form
            "add": h + lambda |h| / (2 |S|) S, the norm-matched addition of the paper's author.
            "interpolate": lambda h + (1 - lambda) S, equation 16 of the paper.
        gate
            Refuse maps that were made with another gate split.

        Raises
        ------
        SteeringError
            When this was made with another model, revision, dtype or gate. Inside the `with`: when values become
            infinite or NaN, a cache has tokens that were not read inside, or the numbers of texts and strengths differ.
        OptionError
            For a form that does not exist or a strength that is not a number.
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
        """Raise a SteeringError for a model that this was not made with, or a gate split that its maps do not have."""
        check_model(type(self).__name__.lower(), self.model, self.weights, model)
        if gate is not None and self.gates - {gate}:
            own = ", ".join(sorted(self.gates))
            raise SteeringError(f"the operator's maps have gate={own!r}, not {gate!r}; make it again with that split")
