"""Spectra of token maps that are known in full."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.sums import norms
from loclin.common.surroundings import in_plain_torch
from loclin.spectral.bounds import left_svd, norm_from_below, outside, rounding, schatten, upper_values
from loclin.spectral.checks import check_rank, check_tolerance, wide, widened
from loclin.spectral.result import SVD, aligned
from loclin.spectral.threads import each

_OVERSAMPLING = 8


@in_plain_torch
def values(dense: Float[Tensor, "d_out T d_in"]) -> Float[Tensor, "T r"]:
    """All singular values of each token's map, descending. Cost: T SVDs without vectors."""
    return torch.stack(each(torch.linalg.svdvals, widened(dense).transpose(0, 1)))


@in_plain_torch
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
    frobenius = norms(matrices, 1).to(S)
    error = error + _coarseness(dense, joint) * S[:, :1]
    found = SVD(U, S, Vh, residuals, (S - error).clamp(min=0), S + error, 0.0, frobenius, "full", spectrum=spectrum)
    return shaped(found, dense.shape[1]) if joint else found


@in_plain_torch
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
    check_tolerance(tolerance, wide(dense.dtype))
    matrices = _matrices(dense, k, joint)
    parts = each(lambda matrix: _top_of(matrix, k, towards, tolerance, seed), matrices)
    U, S, Vh, residuals, lower, upper = (torch.stack(part) for part in zip(*parts, strict=True))
    coarse = _coarseness(dense, joint) * S[:, :1]
    lower, upper = (lower - coarse).clamp(min=0), upper + coarse
    found = SVD(U, S, Vh, residuals, lower, upper, 0.0, norms(matrices, 1).to(S), "top")
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


def _coarseness(dense: Tensor, joint: bool) -> float:
    """The share of a map's largest value that rounding in half precision may have added to any, before it came here."""
    if wide(dense.dtype) == dense.dtype:
        return 0.0
    d_out, length, d_in = dense.shape
    return rounding(d_out, length * d_in if joint else d_in, dense.dtype)


def _matrices(dense: Tensor, k: int, joint: bool) -> Tensor:
    d_out, length, d_in = dense.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    dense = widened(dense)
    return dense.reshape(1, d_out, length * d_in) if joint else dense.transpose(0, 1)


def _one(matrix: Tensor, k: int, towards: Tensor) -> tuple[Tensor, ...]:
    U, spectrum, Vh = torch.linalg.svd(matrix, full_matrices=False)
    slack = rounding(matrix.shape[0], matrix.shape[1], matrix.dtype) * spectrum[0]
    error = norms(matrix - (U * spectrum) @ Vh).to(spectrum) + slack
    U, Vh = (part[0] for part in aligned(U[None, :, :k], Vh[None, :k], towards))
    S = spectrum[:k]
    residuals = _residuals(matrix, U, S, Vh)
    return U.contiguous(), S, Vh.contiguous(), residuals, error.expand(k), spectrum


def _residuals(matrix: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    right = (matrix @ Vh.mT - U * S.unsqueeze(-2)).norm(dim=-2)
    left = (U.mT @ matrix - S.unsqueeze(-1) * Vh).norm(dim=-1)
    return torch.maximum(right, left)


def _top_of(matrix: Tensor, k: int, towards: Tensor, tolerance: float, seed: int) -> tuple[Tensor, ...]:
    """One matrix's triples and bounds."""
    d_out, d_in = matrix.shape
    block = k + _OVERSAMPLING
    if 3 * block <= min(d_out, d_in):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(d_in, block, generator=generator, dtype=torch.float64).to(matrix)
        J = matrix[None].contiguous()
        Q, B = J.new_zeros(1, d_out, 0), J.new_zeros(1, 0, d_in)
        images = J @ start
        while Q.shape[-1] + block <= max(3 * block, min(d_out, d_in) // 3):
            new = orthonormal(images, Q)
            Q, B = torch.cat([Q, new], dim=-1), torch.cat([B, new.mT @ J], dim=-2)
            images = J @ B[:, -block:].mT
            found = None if Q.shape[-1] < 3 * block else _certified(J, Q, B, k, block, tolerance)
            if found is not None:
                U, S, Vh, *bounds = found
                U, Vh = aligned(U, Vh, towards)
                return tuple(part[0] for part in (U, S, Vh, *bounds))
    U, S, Vh, residuals, error, _ = _one(matrix, k, towards)
    return U, S, Vh, residuals, (S - error).clamp(min=0), S + error


def orthonormal(images: Float[Tensor, "M d_out b"], Q: Float[Tensor, "M d_out m"]) -> Float[Tensor, "M d_out b"]:
    """Orthonormal columns that go on from Q; directions that have vanished become zero columns."""
    for _ in range(2):
        images = images - Q @ (Q.mT @ images)
        images = torch.linalg.qr(images).Q
    vanished = (Q.mT @ images).norm(dim=-2) > 10 * rounding(Q.shape[1], Q.shape[2], Q.dtype)
    return images.masked_fill(vanished.unsqueeze(-2), 0.0)


def _certified(J: Tensor, Q: Tensor, B: Tensor, k: int, block: int, tolerance: float) -> tuple[Tensor, ...] | None:
    """The Ritz triples of `J [1, d_out, d_in]` with their bounds; None where these are not within the tolerance."""
    W, all_values = left_svd(B)
    U, S, Vh = torch.linalg.svd(W[..., :k].mT.to(B) @ B, full_matrices=False)
    U = Q @ (W[..., :k].to(B) @ U)
    residuals = _residuals(J, U, S, Vh)
    floor = rounding(J.shape[1], J.shape[2], J.dtype)
    # Vanished directions may leave columns that are less than orthonormal; what they lack counts as rounding.
    gram = Q.mT @ Q
    overlap = norms(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), 1).to(S)
    slack = (floor + overlap).unsqueeze(-1) * S[:, :1]
    enough = torch.maximum(tolerance * S, 2 * slack)
    # A value is off by about its residual's square; bounds are not worth their price before.
    near = (residuals.square() <= enough * S).all() or (residuals <= enough).all()
    if not near or not (U.norm(dim=-2) > 0.5).all():  # a zero map has no left vectors here
        return None
    pushed = torch.eye(B.shape[-2], B.shape[-2] - block, dtype=W.dtype, device=W.device)
    missed = outside(W, all_values, pushed[None], 10 * floor)
    E = J - Q @ B
    # Where less than ||E|| is too much already, no bound on it will do.
    hoped = upper_values(all_values, missed, norm_from_below(E).double())[:, :k].to(S)
    if not (hoped - S <= enough).all():
        return None
    upper = torch.full_like(S, torch.inf)
    for eta in schatten(E):
        bound = upper_values(all_values, missed, eta)[:, :k]
        upper = torch.minimum(upper, torch.maximum(bound.to(S), S) + slack)
        if (upper - S <= enough).all():
            return U, S, Vh, residuals, (S - slack).clamp(min=0), upper
    return None
