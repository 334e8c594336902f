"""Directions that are projected out of a model's hidden states while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.models import Model, wrap
from loclin.models.forward import hidden_output, hooked, with_hidden_output
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.steering.match import check_model


@dataclass(frozen=True, repr=False, kw_only=True)
class Projection(Result):
    """A subspace that is projected out of a module's output: h - Q Q^T h, at every position."""

    basis: Float[Tensor, "d m"]  # Q, with orthonormal columns
    module: str  # the path of the module: a decoder layer, or the final norm
    model: dict[str, Any]  # and `weights`: as in `loclin.steering.Steering`
    weights: str
    provenance: Provenance | None  # of the map from which the directions come
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Projection({self.basis.shape[1]} directions out of {self.module})"

    @contextmanager
    def apply(self, model: Model | nn.Module) -> Iterator[None]:
        """Project the subspace out inside a `with`; afterwards the model is unchanged, also after an error.

        Cost: two d x m products per token. Another model than the one it was made with: SteeringError.
        """
        model = model if isinstance(model, Model) else wrap(model)
        check_model("projection", self.model, self.weights, model)

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            h = hidden_output(output)
            Q = self.basis.to(h.device)
            wide = h.to(torch.promote_types(h.dtype, Q.dtype))
            new = (wide - (wide @ Q) @ Q.T).to(h.dtype)
            return with_hidden_output(output, new)

        if not self.basis.shape[1]:
            yield
            return
        with hooked([model.hf.get_submodule(self.module).register_forward_hook(change)]):
            yield
