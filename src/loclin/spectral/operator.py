"""What a spectrum is taken of: token maps side by side, known by their products alone or in full."""

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
        """Where products live."""
        ...

    def matmat(self, Xs: Float[Tensor, "n T d_in"]) -> Float[Tensor, "n d_out"]:
        """sum_i J_i x_i of n blocks of vectors. Cost: n columns."""
        ...

    def rmatmat(self, Us: Float[Tensor, "n d_out"]) -> Float[Tensor, "n T d_in"]:
        """Every J_i^T u of n vectors. Cost: n columns."""
        ...


class DenseMaps:
    """Token maps from a dense tensor `[d_out, T, d_in]`. `columns` counts what products have cost."""

    def __init__(self, dense: Float[Tensor, "d_out T d_in"]) -> None:
        self.dense = dense
        self.columns = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        d_out, length, d_in = self.dense.shape
        return d_out, length, d_in

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.dense.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensor lives."""
        return self.dense.device

    def matmat(self, Xs: Float[Tensor, "n T d_in"]) -> Float[Tensor, "n d_out"]:
        """sum_i J_i x_i of n blocks of vectors. Cost: n columns, 2 n d_out T d_in flops."""
        self.columns += len(Xs)
        return Xs.flatten(1) @ self.dense.flatten(1).T

    def rmatmat(self, Us: Float[Tensor, "n d_out"]) -> Float[Tensor, "n T d_in"]:
        """Every J_i^T u of n vectors. Cost: n columns, 2 n d_out T d_in flops."""
        self.columns += len(Us)
        return (Us @ self.dense.flatten(1)).unflatten(1, self.dense.shape[1:])
