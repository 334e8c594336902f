"""Singular triples J_i v = s u with their error bounds, their signs, and blocks of near-equal values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.surroundings import in_plain_torch
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import by_rank

NEAR_EQUAL = 1e-3
"""Neighbouring singular values closer than this, relative to the larger one, are one block: their vectors are not
defined, only the subspace that they span."""


@dataclass(frozen=True)
class SVD(Result):
    """The k largest singular triples of each token's map (paper, section 3.3), with their error bounds.

    A joint decomposition has `U [d_out, k]`, `Vh [k, T, d_in]`, and no token axis in everything else.

    Attributes
    ----------
    U, S, Vh: the triples, `[T, d_out, k]`, `[T, k]`, `[T, k, d_in]`, values descending.
    residuals: `[T, k]`, the larger of |J v - s u| and |J^T u - s v|, or a bound on it, in S's units.
    lower, upper: `[T, k]`, bounds on the true j-th singular value, rounding included.
    failure: the probability with which some upper bound (or bound on a residual) may not hold; 0 when all are rigorous,
        1 when the upper ones are estimates.
    frobenius: `[T]`, the Frobenius norms; where `failure` is positive, estimates.
    method: how they were found: "lapack", "block_krylov" (on the dense map), "matrix_free", "gram" (J J^T, for
        dense maps beyond the budget), or "ritz" (block Krylov on the dense map, with estimated upper bounds).
    columns: the columns of matrix-free products; 0 for methods on the dense map.
    spectrum: `[T, r]`, all singular values, from LAPACK; else None.
    provenance, warnings: the map, and warnings about the prompt.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    lower: Tensor
    upper: Tensor
    failure: float
    frobenius: Tensor
    method: str
    columns: int = 0
    spectrum: Tensor | None = None
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per token and rank; of a joint decomposition, per rank."""
        columns = {"singular_value": self.S, "lower": self.lower, "upper": self.upper, "residual": self.residuals}
        return by_rank(columns, self.provenance)

    @property
    def relative_error(self) -> Tensor:
        """The largest error of S that the bounds allow, relative to S; `[T, k]`. 0 where S is known to be 0."""
        off = torch.maximum(self.upper - self.S, self.S - self.lower)
        return torch.where(off > 0, off / self.S, 0.0)

    @in_plain_torch
    def blocks(self, token: int | None = None, tolerance: float = NEAR_EQUAL) -> list[list[int]]:
        """Indices of a token's singular values (None: joint ones), neighbours that cannot be told apart in one block.

        Those are neighbours closer than the relative `tolerance`, or with bounds that overlap.
        """
        S, lower, upper = (part if token is None else part[token] for part in (self.S, self.lower, self.upper))
        return near_equal(S, lower, upper, tolerance)

    @in_plain_torch
    def gains(self, x: Float[Tensor, "T d_in"]) -> Float[Tensor, "T k"]:
        """The component of each token's own input along every right vector: v . x."""
        joint = self.S.dim() == 1  # Vh is [k, T, d_in] then, else [T, k, d_in]
        return torch.einsum("ktd,td->tk" if joint else "tkd,td->tk", self.Vh, x.to(self.Vh))

    @in_plain_torch
    def subspace_angles(self, other: SVD, token: int | None = None) -> list[Tensor]:
        """Principal angles in radians between the left vectors of two results, for each block of this one.

        With orthonormal X and Y of two blocks, sines are the singular values of Y - X X^T Y, and cosines those of X^T
        Y. Cosines lose small angles, so sines are used below 45 degrees (Björck & Golub 1973; Knyazev & Argentati
        2002). Cost: one small QR and SVD per block.
        """
        mine, theirs = (found.U if token is None else found.U[token] for found in (self, other))
        angles = []
        for block in self.blocks(token):
            X, Y = (torch.linalg.qr(side[:, block]).Q for side in (mine, theirs))
            cosines = torch.linalg.svdvals(X.T @ Y).flip(0).clamp(max=1)
            sines = torch.linalg.svdvals(Y - X @ (X.T @ Y)).clamp(max=1)
            angles.append(torch.where(sines.square() < 0.5, sines.arcsin(), cosines.flip(0).arccos()))
        return angles


def near_equal(
    S: Float[Tensor, " k"], lower: Float[Tensor, " k"], upper: Float[Tensor, " k"], tolerance: float = NEAR_EQUAL
) -> list[list[int]]:
    """Indices of descending values, in blocks of neighbours that cannot be told apart; see `SVD.blocks`."""
    values, below, above = S.tolist(), lower.tolist(), upper.tolist()
    groups = [[0]] if values else []
    for i in range(1, len(values)):
        if values[i - 1] - values[i] <= tolerance * values[i - 1] or above[i] > below[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def align_signs(
    U: Float[Tensor, "M d_out k"], Vh: Float[Tensor, "M k n"], align_to: Float[Tensor, " d_out"]
) -> tuple[Float[Tensor, "M d_out k"], Float[Tensor, "M k n"]]:
    """Flip the signs of triples so that every left vector has a non-negative product with `align_to`."""
    sign = torch.where(align_to.to(U) @ U < 0, -1.0, 1.0).to(U.dtype)
    return U * sign.unsqueeze(-2), Vh * sign.unsqueeze(-1)
