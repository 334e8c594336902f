"""The largest singular triples of many known maps, quickly: Ritz values, without bounds from above.

Where hundreds of maps are looked at, as along the layers of a network, a certificate for each (see
`loclin.spectral.top`) would cost more than the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loclin.spectral.checks import check_rank, check_tolerance
from loclin.spectral.threads import each

_OVERSAMPLING = 4
_FIRST = 3
"""Steps before it is worth looking at the values: fewer are hardly ever enough."""


@dataclass(frozen=True)
class Ritz:
    """The k largest triples of one matrix: `U [d_out, k]`, `S [k]`, `Vh [k, n]`, and `residuals [k]`.

    `residuals` are |J v - s u|; |J^T u - s v| is rounding. `frobenius` is the matrix's norm.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    frobenius: Tensor


def ritz(
    matrices: Sequence[Tensor],
    k: int,
    towards: Sequence[Tensor],
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> list[Ritz]:
    """The k largest triples of each matrix by a randomized block Krylov method that keeps every block.

    A matrix is done when the square of each value's residual is within `tolerance` of the square of the value: a Ritz
    value is never above the true one, and off by about that much. One that a basis of half its smaller side does not
    serve goes to LAPACK. Left vectors have a non-negative product with the matrix's `towards`.

    Parameters
    ----------
    matrices
        Each `[d_out, n]`; n may differ.
    k
        How many triples.
    towards
        Each `[d_out]`.
    tolerance, seed
        Of the values; of the random start.

    Cost: a step is 4 d_out n (k + 4) flops; three to five steps on language models' maps at 1e-3.

    Raises
    ------
    OptionError
        When k is not between 1 and the smaller side, or the tolerance is below what the dtype holds.
    """
    for matrix in matrices:
        check_rank(k, *matrix.shape)
        check_tolerance(tolerance, matrix.dtype)
    starts = {}
    for matrix in matrices:
        if matrix.shape[1] not in starts:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(matrix.shape[1], k + _OVERSAMPLING, generator=generator, dtype=torch.float64)
            starts[matrix.shape[1]] = start.to(matrix)

    def work(matrix: Tensor) -> tuple[Tensor, ...]:
        found = _krylov(matrix, starts[matrix.shape[1]], k, tolerance) or _lapack(matrix, k)
        return *found, torch.linalg.matrix_norm(matrix)

    return [_turned(parts, goal) for parts, goal in zip(each(work, matrices), towards, strict=True)]


def _turned(parts: tuple[Tensor, ...], towards: Tensor) -> Ritz:
    U, S, Vh, residuals, frobenius = parts
    sign = torch.where(towards.to(U) @ U < 0, -1.0, 1.0).to(U)
    return Ritz(U * sign, S, Vh * sign.unsqueeze(1), residuals, frobenius)


def _krylov(matrix: Tensor, start: Tensor, k: int, tolerance: float) -> tuple[Tensor, ...] | None:
    """U, S, Vh and residuals; None where the basis would become too large, or the matrix has less than k directions."""
    block, most = start.shape[1], min(matrix.shape) // 2
    # Everything has its vectors in rows, so that blocks are appended and QR's columns are read in place.
    Q, B, pushed = matrix.new_zeros(0, matrix.shape[0]), matrix.new_zeros(0, matrix.shape[1]), None
    images = start.mT @ matrix.mT
    while len(Q) + block <= most:
        for _ in range(2):
            images = torch.linalg.qr((images - images @ Q.mT @ Q).mT).Q.mT
        Q, B = torch.cat([Q, images]), torch.cat([B, images @ matrix])
        images = B[-block:] @ matrix.mT
        pushed = images if pushed is None else torch.cat([pushed, images])
        if len(Q) < _FIRST * block:
            continue
        squares, W = torch.linalg.eigh((B @ B.mT).double())
        S, W = squares[-k:].flip(0).clamp(min=0).sqrt().to(matrix), W[:, -k:].flip(1).to(matrix)
        if not S[-1] > 10 * torch.finfo(S.dtype).eps * S[0]:
            return None
        U, combined = W.mT @ Q, W.mT / S.unsqueeze(1)
        residuals = (combined @ pushed - S.unsqueeze(1) * U).norm(dim=1)
        if (residuals.square() <= tolerance * S.square()).all():
            return U.mT, S, combined @ B, residuals
    return None


def _lapack(matrix: Tensor, k: int) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    U, S, Vh = U[:, :k], S[:k], Vh[:k]
    return U, S, Vh, (matrix @ Vh.mT - U * S).norm(dim=0)
