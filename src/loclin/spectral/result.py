"""Singular triples with their error bounds, signs, and blocks of near-equal values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.results.result import Provenance, Result
from loclin.results.table import by_rank

if TYPE_CHECKING:
    from pandas import DataFrame

NEAR_EQUAL = 1e-3
"""Neighbouring singular values closer than this share of the larger one are one block: single vectors in it are not
defined, only the subspace is."""


@dataclass(frozen=True)
class SVD(Result):
    """The k largest singular triples of each token's map (paper, section 3.3), and how far to trust them.

    Of a joint decomposition, `U [d_out, k]`, `Vh [k, T, d_in]`, and everything else loses its token axis.

    Attributes
    ----------
    U, S, Vh
        The triples: `[T, d_out, k]`, `[T, k]`, `[T, k, d_in]`, values descending.
    residuals
        `[T, k]`: the larger of |J v - s u| and |J^T u - s v|, or a bound on it, in S's units.
    lower, upper
        `[T, k]`: bounds on the map's own j-th singular value, rounding included.
    failure
        The probability with which some upper bound (or bound on a residual) may not hold; 0 when all are rigorous, 1
        when the upper ones are estimates.
    frobenius
        `[T]`: the Frobenius norms; where `failure` is positive, estimates.
    route
        How they were found: "full", "top", "krylov" or "ritz".
    columns
        What products with an operator cost; 0 on dense routes.
    spectrum
        `[T, r]`: all the singular values, where the route knows them.
    provenance
        Which map this is of.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    lower: Tensor
    upper: Tensor
    failure: float
    frobenius: Tensor
    route: str
    columns: int = 0
    spectrum: Tensor | None = None
    provenance: Provenance | None = None

    __repr__ = brief

    def to_dataframe(self) -> DataFrame:
        """One row per token and rank (of a joint decomposition: per rank); needs pandas."""
        columns = {"singular_value": self.S, "lower": self.lower, "upper": self.upper, "residual": self.residuals}
        return by_rank(columns, self.provenance)

    @property
    def relative_error(self) -> Tensor:
        """The most that S can be off, as a share of S; `[T, k]`. 0 where the map is known to have no such value."""
        off = torch.maximum(self.upper - self.S, self.S - self.lower)
        return torch.where(off > 0, off / self.S, 0.0)

    @in_plain_torch
    def blocks(self, token: int | None = None, tolerance: float = NEAR_EQUAL) -> list[list[int]]:
        """Indices of the singular values, grouped so that neighbours that cannot be told apart are together.

        Parameters
        ----------
        token
            Which token's; None for a joint decomposition.
        tolerance
            The relative distance below which neighbours count as equal. They also do where their bounds overlap.
        """
        S, lower, upper = (part if token is None else part[token] for part in (self.S, self.lower, self.upper))
        return near_equal(S, lower, upper, tolerance)

    @in_plain_torch
    def gains(self, x: Float[Tensor, "T d_in"]) -> Float[Tensor, "T k"]:
        """How much of every right vector is in each token's own input: v . x."""
        joint = self.S.dim() == 1  # Vh is [k, T, d_in] then, else [T, k, d_in]
        return torch.einsum("ktd,td->tk" if joint else "tkd,td->tk", self.Vh, x.to(self.Vh))

    @in_plain_torch
    def subspace_angles(self, other: SVD, token: int | None = None) -> list[Tensor]:
        """Principal angles in radians between the output sides of two results, for each of this one's blocks.

        Cosines lose small angles, so these are the arcsines of the part that sticks out (Björck & Golub 1973;
        Knyazev & Argentati 2002). Cost: one small QR and SVD per block.
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
    """Indices of descending values, neighbours that cannot be told apart together; see `SVD.blocks`."""
    values, below, above = S.tolist(), lower.tolist(), upper.tolist()
    groups = [[0]] if values else []
    for i in range(1, len(values)):
        if values[i - 1] - values[i] <= tolerance * values[i - 1] or above[i] > below[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def aligned(
    U: Float[Tensor, "M d_out k"], Vh: Float[Tensor, "M k n"], towards: Float[Tensor, " d_out"]
) -> tuple[Float[Tensor, "M d_out k"], Float[Tensor, "M k n"]]:
    """Turn triples so that every left vector has a non-negative product with `towards`, the output."""
    sign = torch.where(towards.to(U) @ U < 0, -1.0, 1.0).to(U.dtype)
    return U * sign.unsqueeze(-2), Vh * sign.unsqueeze(-1)
