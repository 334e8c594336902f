"""The largest singular triples of many dense maps at once: Ritz values, without rigorous upper bounds.

For hundreds of maps, the bounds of `loclin.spectral.block_krylov_svd` would cost more than the maps. Ritz values
s = sigma(Q^T J) are never above the true ones, and below them by about |J v - s u|^2 / s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.sums import norms
from loclin.spectral.checks import check_rank, check_tolerance, to_wide
from loclin.spectral.norms import stable_rank

_OVERSAMPLING = 4
_LARGEST = 1e-6  # the tolerance of the largest value, from which stable ranks are computed
_FIRST = 3  # steps before the values are computed for the first time: fewer are hardly ever enough


@dataclass(frozen=True)
class RitzTriples:
    """The k largest triples of M matrices."""

    U: Tensor  # [M, d_out, k]
    S: Tensor  # [M, k]
    Vh: Tensor  # [M, k, n]
    residuals: Tensor  # [M, k]: |J v - s u|; |J^T u - s v| is rounding
    frobenius: Tensor  # [M]: the matrices' norms

    __repr__ = brief

    @property
    def stable_rank(self) -> Tensor:
        """Of each matrix `[M]`."""
        return stable_rank(self.frobenius, self.S[:, 0])


def ritz_svd(
    matrices: Float[Tensor, "M d_out n"],
    k: int,
    align_to: Float[Tensor, " d_out"],
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> RitzTriples:
    """The k largest triples of each matrix by a randomized block Krylov method that keeps every block.

    A matrix is done when residual^2 <= `tolerance` s^2 for each value s, and 1e-6 s^2 for the largest, from which
    stable ranks are computed. LAPACK decomposes those for which a basis of half the smaller side is not enough. All
    matrices take a step together: one alone is too small to keep a processor busy. Left vectors have a non-negative
    product with `align_to`. OptionError for a k or a tolerance that the matrices do not have or hold.

    Cost: a step is 4 d_out n (k + 4) flops; three to five steps on language models' maps at 1e-3.
    """
    matrices = to_wide(matrices)
    count, d_out, n = matrices.shape
    check_rank(k, d_out, n)
    check_tolerance(tolerance, matrices.dtype)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(k + _OVERSAMPLING, n, generator=generator, dtype=torch.float64).to(matrices)
    found = RitzTriples(
        U=matrices.new_zeros(count, d_out, k),
        S=matrices.new_zeros(count, k),
        Vh=matrices.new_zeros(count, k, n),
        residuals=matrices.new_zeros(count, k),
        frobenius=norms(matrices, 1).to(matrices),
    )
    for i in _krylov(matrices, start, k, tolerance, found):
        _write(found, [i], *_lapack(matrices[i : i + 1], k))
    sign = torch.where((align_to.to(found.U) @ found.U) < 0, -1.0, 1.0).to(found.U)
    found.U.mul_(sign.unsqueeze(1))
    found.Vh.mul_(sign.unsqueeze(2))
    return found


def _write(found: RitzTriples, at: list[int], *parts: Tensor) -> None:
    """Write the U, S, Vh and residuals of some matrices."""
    index = torch.tensor(at, device=found.S.device)
    for field, part in zip(fields(found), parts, strict=False):
        getattr(found, field.name)[index] = part


def _krylov(J: Tensor, start: Tensor, k: int, tolerance: float, found: RitzTriples) -> list[int]:
    """Write the triples of all matrices with k directions in a small basis; returns the indices of the others."""
    block, most = len(start), min(J.shape[1:]) // 2
    left, failed = list(range(len(J))), list[int]()
    allowed = J.new_full((k,), tolerance)  # of (residual / value)^2
    allowed[0] = min(tolerance, max(_LARGEST, (10 * torch.finfo(J.dtype).eps) ** 2))  # what rounding leaves
    maps = list(J)  # one thin product after the other is faster than a batch of them, and needs no copies
    # Vectors are rows, so that blocks can be appended and QR's columns are read in place: Q [M, m, d_out] spans
    # J x, (J J^T) J x, ...; B = Q J [M, m, n]; pushed = B J^T [M, m, d_out].
    Q, B, pushed = J[:, :, :0].mT, J[:, :0], J[:, :, :0].mT
    images = torch.stack([start @ map_.T for map_ in maps])
    while left and Q.shape[1] + block <= most:
        for _ in range(2):
            images = torch.linalg.qr((images - images @ Q.mT @ Q).mT).Q.mT
        rows = [part @ map_ for part, map_ in zip(images, maps, strict=True)]
        Q, B = torch.cat([Q, images], dim=1), torch.cat([B, torch.stack(rows)], dim=1)
        images = torch.stack([row @ map_.T for row, map_ in zip(rows, maps, strict=True)])
        pushed = torch.cat([pushed, images], dim=1)
        if Q.shape[1] < _FIRST * block:
            continue
        # B = W^T S V^T from the eigenvectors W of B B^T; then U = W Q, V = W B / S and J V = W pushed / S.
        squares, W = torch.linalg.eigh((B @ B.mT).double())
        S, W = squares[:, -k:].flip(1).clamp(min=0).sqrt().to(J), W[..., -k:].flip(2).mT.to(J)
        has_k = S[:, -1] > 10 * torch.finfo(S.dtype).eps * S[:, 0]
        combined = W / S.unsqueeze(2).clamp(min=torch.finfo(S.dtype).tiny)
        U = W @ Q
        residuals = (combined @ pushed - S.unsqueeze(2) * U).norm(dim=2)
        done = has_k & (residuals.square() <= allowed * S.square()).all(dim=1)
        if done.any():
            at = [i for i, ready in zip(left, done.tolist(), strict=True) if ready]
            _write(found, at, U[done].mT, S[done], combined[done] @ B[done], residuals[done])
        failed += [i for i, enough in zip(left, has_k.tolist(), strict=True) if not enough]
        keep = has_k & ~done
        if not keep.all():
            left, maps = ([one for one, stays in zip(of, keep.tolist(), strict=True) if stays] for of in (left, maps))
            Q, B, pushed, images = (part[keep] for part in (Q, B, pushed, images))
    return failed + left


def _lapack(matrices: Tensor, k: int) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    U, S, Vh = U[..., :k], S[:, :k], Vh[:, :k]
    return U, S, Vh, (matrices @ Vh.mT - U * S.unsqueeze(1)).norm(dim=1)
