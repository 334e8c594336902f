"""Spectra of token maps that are known in full."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.spectral.bounds import left_svd, norm_from_below, outside, rounding, schatten, upper_values
from loclin.spectral.checks import check_rank, check_tolerance
from loclin.spectral.result import SVD, aligned
from loclin.spectral.threads import each

_OVERSAMPLING = 8


def values(dense: Float[Tensor, "d_out T d_in"]) -> Float[Tensor, "T r"]:
    """All singular values of each token's map, descending. Cost: T SVDs without vectors."""
    return torch.stack(each(torch.linalg.svdvals, dense.transpose(0, 1)))


def full(dense: Float[Tensor, "d_out T d_in"], k: int, *, towards: Float[Tensor, " d_out"], joint: bool = False) -> SVD:
    """Decompose each token's map, or with `joint` all of them side by side, by LAPACK; all values come along.

    Bounds are the measured ||J - U S V^T||_F (Weyl), and rounding for what U and V lack in orthogonality.
    Cost: T full SVDs of `[d_out, d_in]`, or one of `[d_out, T d_in]`.

    Raises
    ------
    OptionError
        When k is not between 1 and the smaller side of the matrix.
    """
    matrices = _matrices(dense, k, joint)
    parts = each(lambda matrix: _one(matrix, k, towards), matrices)
    U, S, Vh, residuals, error, spectrum = (torch.stack(part) for part in zip(*parts, strict=True))
    frobenius = torch.linalg.matrix_norm(matrices)
    found = SVD(U, S, Vh, residuals, (S - error).clamp(min=0), S + error, 0.0, frobenius, "full", spectrum=spectrum)
    return shaped(found, dense.shape[1]) if joint else found


def top(
    dense: Float[Tensor, "d_out T d_in"],
    k: int,
    *,
    towards: Float[Tensor, " d_out"],
    tolerance: float = 1e-3,
    joint: bool = False,
    seed: int = 0,
) -> SVD:
    """Find the k largest triples by a randomized block Krylov method (Musco & Musco 2015; Tropp & Webber 2023).

    Every block is kept. A token is done when its bounds are within `tolerance` of each value; one that a basis of a
    third of the smaller side does not serve is decomposed in full. Bounds are rigorous (see `loclin.spectral.bounds`),
    and so no luck with the random start is assumed.

    Cost: per token and step 4 d_out d_in (k + 8) flops; the bounds up to four products of d x d matrices.

    Raises
    ------
    OptionError
        For a k that the map does not have, or a tolerance that its dtype does not hold.
    """
    check_tolerance(tolerance, dense.dtype)
    matrices = _matrices(dense, k, joint)
    parts = each(lambda matrix: _group(matrix[None], k, towards, tolerance, seed), matrices)
    fields = [torch.cat(part) for part in zip(*parts, strict=True)]
    U, S, Vh, residuals, lower, upper = fields
    found = SVD(U, S, Vh, residuals, lower, upper, 0.0, torch.linalg.matrix_norm(matrices), "top")
    return shaped(found, dense.shape[1]) if joint else found


def shaped(found: SVD, length: int) -> SVD:
    """Take the result of one flat matrix `[d_out, T d_in]` as that of a joint decomposition."""
    spectrum = None if found.spectrum is None else found.spectrum[0]
    return SVD(
        found.U[0],
        found.S[0],
        found.Vh[0].unflatten(1, (length, -1)),
        found.residuals[0],
        found.lower[0],
        found.upper[0],
        found.failure,
        found.frobenius[0],
        found.route,
        found.columns,
        spectrum,
    )


def _matrices(dense: Tensor, k: int, joint: bool) -> Tensor:
    d_out, length, d_in = dense.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    return dense.reshape(1, d_out, length * d_in) if joint else dense.transpose(0, 1)


def _one(matrix: Tensor, k: int, towards: Tensor) -> tuple[Tensor, ...]:
    U, spectrum, Vh = torch.linalg.svd(matrix, full_matrices=False)
    slack = rounding(matrix.shape[0], matrix.shape[1], matrix.dtype) * spectrum[0]
    error = torch.linalg.matrix_norm(matrix - (U * spectrum) @ Vh) + slack
    U, Vh = (part[0] for part in aligned(U[None, :, :k], Vh[None, :k], towards))
    S = spectrum[:k]
    residuals = _residuals(matrix, U, S, Vh)
    return U.contiguous(), S, Vh.contiguous(), residuals, error.expand(k), spectrum


def _residuals(matrix: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    right = (matrix @ Vh.mT - U * S.unsqueeze(-2)).norm(dim=-2)
    left = (U.mT @ matrix - S.unsqueeze(-1) * Vh).norm(dim=-1)
    return torch.maximum(right, left)


def _group(matrices: Tensor, k: int, towards: Tensor, tolerance: float, seed: int) -> list[Tensor]:
    """Triples and bounds of a batch of matrices, all with the same k."""
    count, d_out, d_in = matrices.shape
    matrices = matrices.contiguous()
    block = k + _OVERSAMPLING
    found: dict[int, tuple[Tensor, ...]] = {}
    left = torch.arange(count, device=matrices.device)
    if 3 * block <= min(d_out, d_in):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(d_in, block, generator=generator, dtype=torch.float64).to(matrices)
        J, Q = matrices, matrices.new_zeros(count, d_out, 0)
        B = matrices.new_zeros(count, 0, d_in)
        images = J @ start
        while len(left) and Q.shape[-1] + block <= max(3 * block, min(d_out, d_in) // 3):
            new = _orthonormal(images, Q)
            Q, B = torch.cat([Q, new], dim=-1), torch.cat([B, new.mT @ J], dim=-2)
            images = J @ B[:, -block:].mT
            if Q.shape[-1] < 3 * block:
                continue
            parts, good = _certified(J, Q, B, k, block, tolerance)
            for i in good.nonzero().flatten().tolist():
                U, Vh = aligned(parts[0][i, None], parts[2][i, None], towards)
                found[int(left[i])] = (U[0], parts[1][i], Vh[0], *(part[i] for part in parts[3:]))
            left, J, Q, B, images = left[~good], J[~good], Q[~good], B[~good], images[~good]
    for i in left.tolist():
        U, S, Vh, residuals, error, _ = _one(matrices[i], k, towards)
        found[i] = (U, S, Vh, residuals, (S - error).clamp(min=0), S + error)
    return [torch.stack([found[i][part] for i in range(count)]) for part in range(6)]


def _orthonormal(images: Tensor, Q: Tensor) -> Tensor:
    """Orthonormal columns that go on from Q, batched; directions that have vanished become zero columns."""
    for _ in range(2):
        images = images - Q @ (Q.mT @ images)
        images = torch.linalg.qr(images).Q
    vanished = (Q.mT @ images).norm(dim=-2) > 10 * rounding(Q.shape[1], Q.shape[2], Q.dtype)
    return images.masked_fill(vanished.unsqueeze(-2), 0.0)


def _certified(
    J: Tensor, Q: Tensor, B: Tensor, k: int, block: int, tolerance: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The Ritz triples with their bounds, and which maps' are within the tolerance."""
    W, all_values = left_svd(B)
    U, S, Vh = torch.linalg.svd(W[..., :k].mT.to(B) @ B, full_matrices=False)
    U = Q @ (W[..., :k].to(B) @ U)
    residuals = _residuals(J, U, S, Vh)
    floor = rounding(J.shape[1], J.shape[2], J.dtype)
    # Vanished directions may leave columns that are less than orthonormal; what they lack counts as rounding.
    gram = Q.mT @ Q
    overlap = torch.linalg.matrix_norm(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    slack = (floor + overlap).unsqueeze(-1) * S[:, :1]
    enough = torch.maximum(tolerance * S, 2 * slack)
    lower, upper = (S - slack).clamp(min=0), torch.full_like(S, torch.inf)
    # A value is off by about its residual's square; bounds are not worth their price before.
    good = (residuals.square() <= enough * S).all(dim=-1) | (residuals <= enough).all(dim=-1)
    ready = good.nonzero().flatten()
    if len(ready):
        pushed = torch.eye(B.shape[-2], B.shape[-2] - block, dtype=W.dtype, device=W.device)
        missed = outside(W[ready], all_values[ready], pushed.expand(len(ready), -1, -1), 10 * floor)
        E = J[ready] - Q[ready] @ B[ready]
        # Where less than ||E|| is too much already, no bound on it will do.
        hoped = upper_values(all_values[ready], missed, norm_from_below(E).double())[:, :k].to(S)
        worth = (hoped - S[ready] <= enough[ready]).all(dim=-1)
        good[ready], ready, missed, E = worth, ready[worth], missed[worth], E[worth]
        for eta in schatten(E) if len(ready) else ():
            bound = upper_values(all_values[ready], missed, eta.double())[:, :k]
            upper[ready] = torch.minimum(upper[ready], torch.maximum(bound.to(S), S[ready]) + slack[ready])
            good[ready] = (upper[ready] - S[ready] <= enough[ready]).all(dim=-1)
            if good[ready].all():
                break
    # A zero map has no left vectors here.
    good &= (U.norm(dim=-2) > 0.5).all(dim=-1)
    return (U, S, Vh, residuals, lower, upper), good
