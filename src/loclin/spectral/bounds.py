"""Upper bounds on the singular values of a map that is known on a part of its output space only.

Let Q be orthonormal, B = Q^T J and E = J - Q B. Then J^T J = B^T B + E^T E, so sigma_j(B) <= sigma_j(J). Let the
columns of F be orthonormal input directions whose images lie in the span of Q (they were pushed through J, and Q was
extended by the results). Then E F = 0, so E^T E <= eta^2 (I - F F^T) for any eta >= ||E||_2, and

    sigma_j(J)^2 <= lambda_j(B^T B + eta^2 (I - F F^T)).

Without F this is Weyl's bound, sigma_j(B)^2 + eta^2. With F it is quadratic: if x is the sine of the angle between the
j-th right vector of B and F, it adds about eta^2 x^2, as long as eta^2 plus what B has outside of F is below sigma_j^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.sums import norms
from loclin.spectral.threads import single_thread


def rounding(d_out: int, d_in: int, dtype: torch.dtype) -> float:
    """What rounding may add to any singular value, relative to the largest: sqrt(n) eps (Higham & Mary 2019)."""
    return max(6.0, math.sqrt(max(d_out, d_in))) * torch.finfo(dtype).eps


@single_thread()
def left_svd(B: Float[Tensor, "M m n"]) -> tuple[Float[Tensor, "M m m"], Float[Tensor, "M m"]]:
    """Left singular vectors and values of flat matrices, in float64. Cost: M (2 m^2 n + about 10 m^3) flops.

    Through the Gram matrix, of which float64 keeps more than B's float32 has; float64 itself takes a QR first.
    """
    if B.dtype == torch.float64:
        square = torch.linalg.qr(B.mT, mode="r").R.mT
        W, values, _ = torch.linalg.svd(square, full_matrices=True)
        return W, torch.nn.functional.pad(values, (0, W.shape[-1] - values.shape[-1]))
    B = B.double()
    squares, W = torch.linalg.eigh(B @ B.mT)
    return W.flip(-1), squares.flip(-1).clamp(min=0).sqrt()


@single_thread()
def outside(
    W: Float[Tensor, "*M m m"], values: Float[Tensor, "*M m"], pushed: Float[Tensor, "*M m f"], floor: float
) -> Float[Tensor, "*M m m"]:
    """I - F F^T in the basis of B's right vectors, or an upper bound close to it. Cost: M m f (m + f) flops.

    B has left singular vectors `W` and `values`, and B^T `pushed` spans F. Directions of F below `floor`, relative to
    the largest value, are rounding and not counted; at least 1e-6, which float64 needs.
    """
    # X = S W^T pushed spans F in the basis of right vectors. With a ridge r > 0, X (X^T X + r I)^-1 X^T is at most the
    # projector F F^T, whatever the rank of X.
    X = values.unsqueeze(-1) * (W.mT @ pushed)
    ridge = (max(floor, 1e-6) * values[..., :1]).square().clamp(min=torch.finfo(X.dtype).tiny).unsqueeze(-1)
    gram = X.mT @ X
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device))
    half = torch.linalg.solve_triangular(factor, X.mT, upper=False)
    return torch.eye(X.shape[-2], dtype=X.dtype, device=X.device) - half.mT @ half


def bound_matrix(
    values: Float[Tensor, "M m"], missed: Float[Tensor, "M m m"], square: Float[Tensor, " M"]
) -> Float[Tensor, "M m m"]:
    """B^T B + eta^2 (I - F F^T) in the basis of B's right vectors, `square` being eta^2."""
    return torch.diag_embed(values.square()) + square[:, None, None] * missed


@single_thread()
def upper_values(
    values: Float[Tensor, "M m"], missed: Float[Tensor, "M m m"], eta: Float[Tensor, " M"]
) -> Float[Tensor, "M m"]:
    """Bound the m largest singular values of J from above (see the top of this file). Cost: about 2 M m^3 flops.

    `values` are those of B, `missed` is `outside` of what was pushed, and `eta` at least ||E||_2 of each map.
    """
    square = eta.square()
    squares = torch.linalg.eigvalsh(bound_matrix(values, missed, square)).flip(-1)
    # Input directions that B maps to 0 are not in the basis of its right vectors; for them the bound is eta itself.
    return torch.maximum(torch.maximum(squares, square[:, None]).sqrt(), values)


def schatten(E: Float[Tensor, "M d_out n"]) -> Iterator[Float[Tensor, " M"]]:
    """Ever sharper upper bounds on ||E||_2, in float64: the Schatten norms of order 2, 4, 8 and 16, plus rounding.

    ||E||_2 <= ||E E^T||_F^(1/2) <= ||E||_F, and so on with (E E^T)^2 and (E E^T)^4. Cost: after the first, each takes
    one product of matrices with the smaller side of E.
    """
    scale = norms(E, 1).clamp(min=torch.finfo(E.dtype).tiny)
    yield scale
    E, limit = E / scale[:, None, None].to(E), rounding(E.shape[-2], E.shape[-1], E.dtype)
    power = E @ E.mT if E.shape[-2] <= E.shape[-1] else E.mT @ E
    # ||A||_2^2 = ||A A^T||_2, and rounding changes the computed product by at most a fraction of ||A||_F^2.
    lost = [torch.full_like(scale, limit)]
    for order in (4, 8, 16):
        bound = size = norms(power, 1)
        for part in reversed(lost):
            bound = (bound + part).sqrt()
        yield scale * bound
        if order < 16:
            lost.append(limit * size.square())
            power = power @ power.mT


def norm_from_below(E: Float[Tensor, "M d_out n"], steps: int = 4) -> Float[Tensor, " M"]:
    """A lower bound on ||E||_2, mostly close to it, by the power method from the sum of the rows."""
    vector = E.sum(dim=-2)
    tiny = torch.finfo(E.dtype).tiny
    norm = vector.new_zeros(len(vector))
    for _ in range(steps):
        vector = vector / vector.norm(dim=-1, keepdim=True).clamp(min=tiny)
        image = (E @ vector.unsqueeze(-1)).squeeze(-1)
        norm = image.norm(dim=-1)
        vector = (image.unsqueeze(-2) @ E).squeeze(-2)
    return norm


@cache
def chi2_quantile(probability: float, degrees: int) -> float:
    """The quantile of a chi-square distribution, by bisection."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    low, high = 0.0, degrees + 40.0 * math.sqrt(degrees)
    for _ in range(200):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)).item()
        low, high = (middle, high) if below < probability else (low, middle)
    return low


def chebyshev_bound(squares: float, degree: int | float, level: float, probes: int, failure: float) -> float:
    """Bound lambda_1(A) from above, except with probability `failure`, from a Chebyshev polynomial of A.

    `squares` is the sum of |C(A) g|^2 over Gaussian probes g; C(x) = cos(degree arccos(2 x / level - 1)) is at most 1
    on [0, level] and steep beyond. With u the first eigenvector, |C(A) g|^2 >= C(lambda_1)^2 (u g)^2, and the sum of
    (u g)^2 over the probes is chi-square. Dixon (1983) does this with a power of A; the polynomial needs the square
    root of that degree (Kuczynski & Wozniakowski 1992). A half degree is E^T times a polynomial of A = E E^T: the odd
    Chebyshev polynomial of sqrt(A / level).
    """
    growth = math.sqrt(max(1.0, squares / chi2_quantile(failure, probes)))
    return level * (1 + math.cosh(math.acosh(growth) / degree)) / 2


@single_thread()
def bound_outside(
    T: Float[Tensor, "m m"],
    start: Float[Tensor, "m g"],
    tests: Float[Tensor, "m s"],
    steps: int,
    failure: float,
    floor: float,
) -> float:
    """Bound lambda_1 of P A P, P = I - S S^T, from the block Krylov space that finds A's largest values.

    S is span(start, A start, ..., A^(steps-1) start). Everything is in coordinates of an orthonormal basis of the same
    with A^steps and with the tests in it, where A is `T`; start and tests are Gaussian, and S does not depend on the
    tests. The basis holds every (P A P)^j P g of a test g up to j = steps, so the moments of T up to 2 steps + 1 are
    A's own, and `chebyshev_bound` holds for polynomials of that degree. It rests on the same event at any level, so the
    best of many is taken. Wrong with probability `failure`. What a power adds below `floor`, relative, is rounding.

    Cost: about 10 m^3 flops, no columns.
    """
    S = block = orthonormal_part(start, T.new_zeros(len(T), 0), floor)
    for _ in range(steps - 1):
        block = orthonormal_part(T @ block, S, floor)
        S = torch.cat([S, block], dim=1)
    outside_S = torch.eye(len(T), dtype=T.dtype, device=T.device) - S @ S.T
    values, vectors = torch.linalg.eigh(outside_S @ T @ outside_S)
    masses = (vectors.T @ (outside_S @ tests)).square().sum(dim=1)
    if not values[-1] > 0:
        return 0.0
    levels = values[-1] * torch.logspace(-1.5, 0, 60, dtype=T.dtype, device=T.device)
    y = (values.clamp(min=0) / levels[:, None]).sqrt()
    degree = 2 * steps + 1
    polynomial = torch.where(y <= 1, (degree * y.clamp(max=1).acos()).cos(), (degree * y.clamp(min=1).acosh()).cosh())
    sums = (polynomial.square() * masses).sum(dim=1)
    pairs = zip(sums.tolist(), levels.tolist(), strict=True)
    return min(chebyshev_bound(some, degree / 2, level, tests.shape[1], failure) for some, level in pairs)


@single_thread()
def orthonormal_part(vectors: Float[Tensor, "d c"], Q: Float[Tensor, "d m"], floor: float) -> Float[Tensor, "d r"]:
    """An orthonormal basis of the part of vectors outside the span of Q, without what is below `floor`, relative."""
    vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(vectors.dtype).tiny)
    for _ in range(2):  # twice is enough
        vectors = vectors - Q @ (Q.T @ vectors)
        # Small singular values belong to what the basis has already, or the vectors have twice: rounding.
        vectors, sizes, _ = torch.linalg.svd(vectors, full_matrices=False)
        vectors = vectors[:, sizes > floor]
    return vectors
