"""The operator that matrix-free methods work on: token maps side by side."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class TokenMaps(Protocol):
    """J = [J_0 ... J_{T-1}] as an operator; one column is one vector pushed or pulled through all tokens at once.

    `loclin.LinearMap` is one.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of products."""
        ...

    def matmat(self, Xs: Float[Tensor, "n T d_in"]) -> Float[Tensor, "n d_out"]:
        """sum_i J_i x_i of n blocks of vectors. Cost: n columns."""
        ...

    def rmatmat(self, Us: Float[Tensor, "n d_out"]) -> Float[Tensor, "n T d_in"]:
        """Every J_i^T u of n vectors. Cost: n columns."""
        ...
