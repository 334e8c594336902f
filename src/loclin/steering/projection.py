"""Directions taken out of what a model thinks, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.models import Model, wrap
from loclin.network.route import first
from loclin.results.result import Provenance, Result
from loclin.steering.match import check_model


@dataclass(frozen=True, repr=False, kw_only=True)
class Projection(Result):
    """A subspace that is projected out of a module's output: h - Q Q^T h, at every position.

    Attributes
    ----------
    basis
        Q `[d, m]`, orthonormal columns.
    module
        The path of the module whose output it is: a decoder layer, or what gives `final`.
    model, weights
        The model it was made with, as in `loclin.steering.Steering`.
    provenance
        Of the map that the directions are from.
    """

    basis: Float[Tensor, "d m"]
    module: str
    model: dict[str, Any]
    weights: str
    provenance: Provenance | None

    def __repr__(self) -> str:
        return f"Projection({self.basis.shape[1]} directions out of {self.module})"

    @contextmanager
    def apply(self, model: Model | nn.Module) -> Iterator[None]:
        """Take the subspace out inside a `with`; the model is as it was afterwards, also after an error.

        Raises
        ------
        SteeringError
            When this was made with another model.

        Notes
        -----
        Cost: two d x m products per token.
        """
        model = model if isinstance(model, Model) else wrap(model)
        check_model("projection", self.model, self.weights, model)

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            h = first(output)
            Q = self.basis.to(h.device)
            wide = h.to(torch.promote_types(h.dtype, Q.dtype))
            new = (wide - (wide @ Q) @ Q.T).to(h.dtype)
            return new if isinstance(output, Tensor) else type(output)((new, *output[1:]))

        if not self.basis.shape[1]:
            yield
            return
        handle = model.hf.get_submodule(self.module).register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()
