"""Singular triples of dense token maps, by LAPACK or by a block Krylov method with rigorous bounds.

For computed triples, |sigma_j(J) - s_j| <= ||J - U S V^T||_2 (Weyl). For Ritz values sigma_j(Q^T J) of a Krylov basis Q
the upper bounds are those of `loclin.spectral.bounds`, with eta >= ||J - Q Q^T J||_2 from Schatten norms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.sums import norms
from loclin.common.surroundings import in_plain_torch
from loclin.spectral.bounds import left_svd, norm_from_below, outside, rounding, schatten, upper_values
from loclin.spectral.checks import check_rank, check_tolerance, to_wide, wide_dtype
from loclin.spectral.result import SVD, align_signs
from loclin.spectral.sketch import TokenMaps
from loclin.spectral.threads import map_matrices

_OVERSAMPLING = 8


def join(parts: Iterable[SVD]) -> SVD:
    """The triples of groups of maps as one result."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    names = ("U", "S", "Vh", "residuals", "lower", "upper", "frobenius", "spectrum")
    groups = {name: [getattr(one, name) for one in found] for name in names}
    joined: dict[str, Any] = {name: torch.cat(some) for name, some in groups.items() if isinstance(some[0], Tensor)}
    return replace(found[0], **joined)


@in_plain_torch
def gram_svd(op: TokenMaps, gram: Float[Tensor, "d_out d_out"], k: int, *, align_to: Float[Tensor, " d_out"]) -> SVD:
    """The k largest joint triples from J J^T in float64, for maps that are never held whole.

    Values are those of U^T J, by one backward sweep of k columns, and so below the true ones; upper bounds are the
    eigenvalues of J J^T and their rounding. Cost: k columns backward and k forward.
    """
    d_out, length, d_in = op.shape
    check_rank(k, d_out, length * d_in)
    squares, vectors = torch.linalg.eigh(gram)
    U = vectors.flip(1)[:, :k].to(op.dtype)
    turn, S, Vh = torch.linalg.svd(op.rmatmat(U.T.contiguous()).flatten(1), full_matrices=False)
    U = U @ turn
    residuals = (op.matmat(Vh.unflatten(1, (length, d_in))) - (U * S).T).norm(dim=1)
    slack = rounding(d_out, length * d_in, op.dtype) * S[:1]
    # the sums of J J^T are off by up to n eps |J|_F^2 (n numbers each), its eigenvalues by d_out eps sigma_1^2
    total = gram.trace()
    off = (length * d_in + d_out) * torch.finfo(torch.float64).eps * total
    above = (squares.flip(0)[:k] + off).clamp(min=0).sqrt().to(S)
    U, Vh = (part[0] for part in align_signs(U[None], Vh[None], align_to))
    lower, upper = (S - slack).clamp(min=0), torch.maximum(above, S) + slack
    return SVD(U, S, Vh.unflatten(1, (length, d_in)), residuals, lower, upper, 0.0, total.sqrt().to(S), "gram")


@in_plain_torch
def singular_values(dense: Float[Tensor, "d_out T d_in"]) -> Float[Tensor, "T r"]:
    """All singular values of each token's map, descending. Cost: T SVDs without vectors."""
    return torch.stack(map_matrices(torch.linalg.svdvals, to_wide(dense).transpose(0, 1)))


@in_plain_torch
def lapack_svd(
    dense: Float[Tensor, "d_out T d_in"], k: int, *, align_to: Float[Tensor, " d_out"], joint: bool = False
) -> SVD:
    """Decompose each token's map, or with `joint` all of them side by side, by LAPACK; `spectrum` has all values.

    Bounds are the measured ||J - U S V^T||_F, plus the rounding in the orthogonality of U and V.
    Cost: T full SVDs of `[d_out, d_in]`, or one of `[d_out, T d_in]`. OptionError for a k that a matrix does not have.
    """
    matrices = _matrices(dense, k, joint)
    parts = map_matrices(lambda matrix: _lapack_triples(matrix, k, align_to), matrices)
    U, S, Vh, residuals, error, spectrum = (torch.stack(part) for part in zip(*parts, strict=True))
    frobenius = norms(matrices, 1).to(S)
    error = error + _half_rounding(dense, joint) * S[:, :1]
    found = SVD(U, S, Vh, residuals, (S - error).clamp(min=0), S + error, 0.0, frobenius, "lapack", spectrum=spectrum)
    return as_joint(found, dense.shape[1]) if joint else found


@in_plain_torch
def block_krylov_svd(
    dense: Float[Tensor, "d_out T d_in"],
    k: int,
    *,
    align_to: Float[Tensor, " d_out"],
    tolerance: float = 1e-3,
    joint: bool = False,
    seed: int = 0,
) -> SVD:
    """Find the k largest triples by a randomized block Krylov method (Musco & Musco 2015; Tropp & Webber 2023).

    Every block is kept. A token is done when its bounds are within `tolerance` of each value. If a basis of a third of
    the smaller side is not enough, LAPACK decomposes the map. Bounds are rigorous (see `loclin.spectral.bounds`): they
    do not depend on the random start.

    Cost: per token and step 4 d_out d_in (k + 8) flops; the bounds up to four products of d x d matrices. OptionError
    for a k that the map does not have, or a tolerance that its dtype does not hold.
    """
    check_tolerance(tolerance, wide_dtype(dense.dtype))
    matrices = _matrices(dense, k, joint)
    parts = map_matrices(lambda matrix: _krylov_triples(matrix, k, align_to, tolerance, seed), matrices)
    U, S, Vh, residuals, lower, upper = (torch.stack(part) for part in zip(*parts, strict=True))
    coarse = _half_rounding(dense, joint) * S[:, :1]
    lower, upper = (lower - coarse).clamp(min=0), upper + coarse
    found = SVD(U, S, Vh, residuals, lower, upper, 0.0, norms(matrices, 1).to(S), "block_krylov")
    return as_joint(found, dense.shape[1]) if joint else found


def as_joint(found: SVD, length: int) -> SVD:
    """The result of one flat matrix `[1, d_out, T d_in]` as a joint decomposition, without token axis."""
    tensors = {name: part[0] for name, part in vars(found).items() if isinstance(part, Tensor)}
    return replace(found, **tensors | {"Vh": found.Vh[0].unflatten(1, (length, -1))})


def _half_rounding(dense: Tensor, joint: bool) -> float:
    """What half precision has added to any value of a dense map by rounding, relative to the largest; else 0."""
    if wide_dtype(dense.dtype) == dense.dtype:
        return 0.0
    d_out, length, d_in = dense.shape
    return rounding(d_out, length * d_in if joint else d_in, dense.dtype)


def _matrices(dense: Tensor, k: int, joint: bool) -> Tensor:
    """`[T, d_out, d_in]`, or joint `[1, d_out, T d_in]`, in a dtype that can be decomposed."""
    d_out, length, d_in = dense.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    dense = to_wide(dense)
    return dense.reshape(1, d_out, length * d_in) if joint else dense.transpose(0, 1)


def _lapack_triples(matrix: Tensor, k: int, align_to: Tensor) -> tuple[Tensor, ...]:
    """U `[d_out, k]`, S, Vh, residuals `[k]`, a bound on the error of every value `[k]`, and all values."""
    U, spectrum, Vh = torch.linalg.svd(matrix, full_matrices=False)
    slack = rounding(matrix.shape[0], matrix.shape[1], matrix.dtype) * spectrum[0]
    error = norms(matrix - (U * spectrum) @ Vh).to(spectrum) + slack
    U, Vh = (part[0] for part in align_signs(U[None, :, :k], Vh[None, :k], align_to))
    S = spectrum[:k]
    residuals = _residuals(matrix, U, S, Vh)
    return U.contiguous(), S, Vh.contiguous(), residuals, error.expand(k), spectrum


def _residuals(matrix: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """The larger of |J v - s u| and |J^T u - s v| for each triple."""
    right = (matrix @ Vh.mT - U * S.unsqueeze(-2)).norm(dim=-2)
    left = (U.mT @ matrix - S.unsqueeze(-1) * Vh).norm(dim=-1)
    return torch.maximum(right, left)


def _krylov_triples(matrix: Tensor, k: int, align_to: Tensor, tolerance: float, seed: int) -> tuple[Tensor, ...]:
    """One matrix's U `[d_out, k]`, S, Vh, residuals, lower and upper bounds `[k]`."""
    d_out, d_in = matrix.shape
    block = k + _OVERSAMPLING
    if 3 * block <= min(d_out, d_in):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(d_in, block, generator=generator, dtype=torch.float64).to(matrix)
        J = matrix[None].contiguous()
        Q, B = J.new_zeros(1, d_out, 0), J.new_zeros(1, 0, d_in)
        images = J @ start
        # Q = span(J x, (J J^T) J x, ...), B = Q^T J; [1, d_out, m] and [1, m, d_in]
        while Q.shape[-1] + block <= max(3 * block, min(d_out, d_in) // 3):
            new = orthonormalise(images, Q)
            Q, B = torch.cat([Q, new], dim=-1), torch.cat([B, new.mT @ J], dim=-2)
            images = J @ B[:, -block:].mT
            found = None if Q.shape[-1] < 3 * block else _certified(J, Q, B, k, block, tolerance)
            if found is not None:
                U, S, Vh, *bounds = found
                U, Vh = align_signs(U, Vh, align_to)
                return tuple(part[0] for part in (U, S, Vh, *bounds))
    U, S, Vh, residuals, error, _ = _lapack_triples(matrix, k, align_to)
    return U, S, Vh, residuals, (S - error).clamp(min=0), S + error


def orthonormalise(images: Float[Tensor, "M d_out b"], Q: Float[Tensor, "M d_out m"]) -> Float[Tensor, "M d_out b"]:
    """An orthonormal basis of the part of images outside the span of Q; zero columns where too little is left."""
    for _ in range(2):
        images = images - Q @ (Q.mT @ images)
        images = torch.linalg.qr(images).Q
    vanished = (Q.mT @ images).norm(dim=-2) > 10 * rounding(Q.shape[1], Q.shape[2], Q.dtype)
    return images.masked_fill(vanished.unsqueeze(-2), 0.0)


def _certified(J: Tensor, Q: Tensor, B: Tensor, k: int, block: int, tolerance: float) -> tuple[Tensor, ...] | None:
    """The Ritz triples of `J [1, d_out, d_in]` with their bounds; None if these are not within the tolerance.

    From cheap to expensive: residuals, then bounds with a lower bound on ||E||, E = J - Q B, which are too small; then
    bounds with Schatten norms.
    """
    W, all_values = left_svd(B)
    U, S, Vh = torch.linalg.svd(W[..., :k].mT.to(B) @ B, full_matrices=False)
    U = Q @ (W[..., :k].to(B) @ U)
    residuals = _residuals(J, U, S, Vh)
    floor = rounding(J.shape[1], J.shape[2], J.dtype)
    # Zero columns and those near them may not be quite orthonormal; what they lack counts as rounding.
    gram = Q.mT @ Q
    overlap = norms(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), 1).to(S)
    slack = (floor + overlap).unsqueeze(-1) * S[:, :1]
    enough = torch.maximum(tolerance * S, 2 * slack)
    # A value's error is about its residual squared over the value: bounds cannot hold before that is small.
    near = (residuals.square() <= enough * S).all() or (residuals <= enough).all()
    if not near or not (U.norm(dim=-2) > 0.5).all():  # a zero map has no left vectors here
        return None
    # The right vectors of all blocks but the last were pushed through J.
    pushed = torch.eye(B.shape[-2], B.shape[-2] - block, dtype=W.dtype, device=W.device)
    missed = outside(W, all_values, pushed[None], 10 * floor)
    E = J - Q @ B
    least = upper_values(all_values, missed, norm_from_below(E).double())[:, :k].to(S)
    if not (least - S <= enough).all():
        return None
    upper = torch.full_like(S, torch.inf)
    for eta in schatten(E):
        bound = upper_values(all_values, missed, eta)[:, :k]
        upper = torch.minimum(upper, torch.maximum(bound.to(S), S) + slack)
        if (upper - S <= enough).all():
            return U, S, Vh, residuals, (S - slack).clamp(min=0), upper
    return None
