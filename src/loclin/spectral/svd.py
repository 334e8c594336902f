"""Singular value decompositions of a token's map, with signs, residuals and blocks of near-equal values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.errors import OptionError
from loclin.frames import by_rank
from loclin.results import Provenance, Result

if TYPE_CHECKING:
    from pandas import DataFrame

NEAR_EQUAL = 1e-3
"""Neighbouring singular values closer than this share of the larger one are one block: single vectors in it are not
defined, only the subspace is."""


@dataclass(frozen=True)
class SVD(Result):
    """The k largest singular triples of each token's map (paper, section 3.3).

    `U [T, d_out, k]`, `S [T, k]`, `Vh [T, k, d_in]`; of a joint decomposition `U [d_out, k]`, `S [k]`,
    `Vh [k, T, d_in]`. `residuals`, shaped as `S`, are the larger of |J v - s u| and |J^T u - s v|, in S's units.
    `spectrum [T, r]`, or `[r]`, are all the singular values. `provenance` says which map they are of.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    spectrum: Tensor
    provenance: Provenance | None = None

    def to_dataframe(self) -> DataFrame:
        """One row per token and rank (of a joint decomposition: per rank); needs pandas."""
        return by_rank({"singular_value": self.S, "residual": self.residuals}, self.provenance)

    def blocks(self, token: int | None = None, tolerance: float = NEAR_EQUAL) -> list[list[int]]:
        """Indices of the singular values, grouped so that near-equal neighbours are together.

        Parameters
        ----------
        token
            Which token's; None for a joint decomposition.
        tolerance
            The relative distance below which neighbours count as equal.
        """
        values = (self.S if token is None else self.S[token]).tolist()
        groups = [[0]] if values else []
        for i in range(1, len(values)):
            if values[i - 1] - values[i] <= tolerance * values[i - 1]:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups


def svd(dense: Float[Tensor, "d_out T d_in"], k: int, towards: Float[Tensor, " d_out"], joint: bool = False) -> SVD:
    """Decompose a dense map, token by token or all tokens side by side.

    Signs are chosen so that every left vector has a non-negative product with `towards`, the output.
    Cost: T full SVDs of `[d_out, d_in]`, or one of `[d_out, T d_in]`.

    Raises
    ------
    OptionError
        When k is not between 1 and the smaller side of the matrix.
    """
    d_out, length, d_in = dense.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    matrices = dense.reshape(1, d_out, length * d_in) if joint else dense.transpose(0, 1)
    parts = [_one(matrix, k, towards) for matrix in tqdm(matrices, desc="SVD", delay=2, leave=False, disable=None)]
    U, S, Vh, residuals, spectrum = (torch.stack(part) for part in zip(*parts, strict=True))
    if joint:
        return SVD(U[0], S[0], Vh[0].reshape(k, length, d_in), residuals[0], spectrum[0])
    return SVD(U, S, Vh, residuals, spectrum)


def check_rank(k: int, d_out: int, d_in: int) -> None:
    """Refuse a number of singular triples that a matrix does not have.

    Raises
    ------
    OptionError
        When k is not between 1 and the smaller side.
    """
    most = min(d_out, d_in)
    if not 1 <= k <= most:
        raise OptionError(f"k={k}: the map has {most} singular values, so k is 1 to {most}")


def _one(matrix: Tensor, k: int, towards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    U, spectrum, Vh = torch.linalg.svd(matrix, full_matrices=False)
    U, S, Vh = U[:, :k], spectrum[:k], Vh[:k]
    sign = torch.where(towards.to(U) @ U < 0, -1.0, 1.0).to(U.dtype)
    U, Vh = U * sign, Vh * sign[:, None]
    right = (matrix @ Vh.T - U * S).norm(dim=0)
    left = (U.T @ matrix - S[:, None] * Vh).norm(dim=1)
    return U.contiguous(), S, Vh.contiguous(), torch.maximum(right, left), spectrum


def stable_rank(frobenius: Float[Tensor, " T"], largest: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """||J||_F^2 / s_1^2 (paper, section 3.5); 0 for a zero map, whose rank is 0."""
    return torch.where(largest > 0, (frobenius / largest.clamp_min(torch.finfo(largest.dtype).tiny)).square(), 0.0)
