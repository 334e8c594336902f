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

_LEVELS = 0.25, 0.5  # of the largest value that the start alone sees: what is missed is less
_MOST_POWERS, _MAGNITUDE = 7, 1e-280  # more powers, or a larger range of what they give, would overflow


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
    """Bound eta^2 = lambda_1(P A P), A = J J^T, where P projects out what the start alone finds of A.

    The tests are Gaussian and independent of the start. With j = `steps`, the basis spans S, the powers of the start up
    to A^j, and those of the tests up to A^(j - 1); P projects out S, and R the start's powers up to A^(j - i), i < j.
    All is in coordinates of the basis, where A is `T`. (R A R)^i R g of a test g is a combination of A^l g, l <= i, and
    of S: it lies in the basis, so T gives it exactly, and of F = J^T P p(R A R) R every |F g|^2, for polynomials p of
    degree i. The tests are independent of F as long as p is chosen by the start.

    Let v be the first eigenvector of P A P. It lies in the range of R, and v R A R v = eta^2. Where p has real roots
    only, p^2 lies above its tangents beyond the last root, so |F^T J^T v|^2 / eta^2 = eta^2 |p(R A R) v|^2 is at least
    eta^2 p(eta^2)^2 (Jensen). This bounds ||F||_2^2 from below, and |F g|^2 it from above, as in `chebyshev_bound`. p
    is the odd Chebyshev polynomial of degree 2 i + 1 in x = sqrt(A / level), over x. Wrong with probability `failure`,
    which the levels share. What a power adds below `floor` is rounding, and left out of P and R, which holds for
    any part of the start's powers.

    Cost: about 10 m^3 flops, no columns.
    """
    blocks = [orthonormal_part(start, T.new_zeros(len(T), 0), floor)]
    largest = torch.linalg.eigvalsh(T)[-1].clamp(min=0)
    for _ in range(steps):
        S, images = torch.cat(blocks, dim=1), T @ blocks[-1]
        noise = floor * (largest * (blocks[-1] * images).sum().clamp(min=0)).sqrt()  # of J (J^T q)
        for _ in range(2):
            images = images - S @ (S.T @ images)
        new, sizes, _ = torch.linalg.svd(images, full_matrices=False)
        blocks.append(new[:, sizes > noise])
    power = min(steps - 1, _MOST_POWERS)
    S, deflated = torch.cat(blocks, dim=1), torch.cat(blocks[: steps + 1 - power], dim=1)
    eye = torch.eye(len(T), dtype=T.dtype, device=T.device)
    R = eye - deflated @ deflated.T
    seen, left = (torch.linalg.eigvalsh(S.T @ part @ S)[-1].item() for part in (T, R @ T @ R))
    if not seen > 0:
        return 0.0  # a Gaussian start misses no other A
    bounds, least = [], seen * max((floor / 10) ** 2, _MAGNITUDE ** (1 / (2 * power + 1)))
    for share in _LEVELS:
        level = share * max(left, least)
        before = images = R @ tests
        for _ in range(power):
            before, images = images, 2 * (R @ (T @ images) * (2 / level) - images) - before
        images -= S @ (S.T @ images)
        squares = (images * (T @ images)).sum().item() / level
        squares = squares if squares < math.inf else math.inf  # nan is inf - inf
        bounds.append(chebyshev_bound(squares, power + 0.5, level, tests.shape[1], failure / len(_LEVELS)))
    return min(bounds)


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
