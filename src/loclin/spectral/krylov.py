"""Singular triples of token maps that are known by their products only: a matrix-free block Krylov method.

The basis Q is grown by Q += span(sum_i w_i J_i J_i^T q). Ritz values sigma_j(Q^T J_i) are lower bounds; upper bounds
take a bound eta on ||E_i||_2 = ||J_i - Q Q^T J_i||_2 (`loclin.spectral.bounds`), which a probabilistic certificate
gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.sums import square_sums
from loclin.common.surroundings import in_plain_torch
from loclin.spectral.bounds import bound_matrix, chi2_quantile, upper_values
from loclin.spectral.checks import check_rank, check_tolerance
from loclin.spectral.dense import as_joint
from loclin.spectral.result import SVD, align_signs
from loclin.spectral.sketch import BasisSVD, Sketch, TokenMaps
from loclin.spectral.threads import single_thread

FAILURE = 1e-3
"""The probability with which the bounds of one result may not hold."""

_SHARED_STEPS = 2  # shared steps before single tokens' vectors are pushed, by default
PROBES = 8
"""Gaussian vectors that measure the Frobenius norm of what the basis misses."""
TESTS = 5
"""Gaussian vectors that one map's first step adds to the basis, to test what the first block's powers miss."""
CERTIFICATE = (4, 5)
"""Gaussian vectors and polynomial degree of the certificate of several maps' ||E||: 40 columns, within 1.3 of the
truth."""
_LEVEL = 0.35  # the ||E||^2 / s_k^2 that is assumed before it has been measured
_NEAR_K = 0.95  # a value beyond the k-th is pushed too if its bound is above this fraction of s_k^2
_TOO_LARGE = 0.8  # above this ||E||^2 / s_k^2 a larger basis gains more than vectors of single maps


def krylov_block(k: int, maps: int = 1) -> int:
    """How many vectors a search for k values begins with; one map's first step adds `TESTS`."""
    return k + 8 if maps > 1 else k + 3


@in_plain_torch
def matrix_free_svd(
    op: TokenMaps,
    k: int,
    *,
    align_to: Float[Tensor, " d_out"],
    tolerance: float = 1e-3,
    joint: bool = False,
    block: int | None = None,
    max_columns: int | None = None,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
) -> SVD:
    """Find the k largest triples of each token's map, or with `joint` of all side by side, from products only.

    A block Krylov method (Musco & Musco 2015; Tropp & Webber 2023) with one output basis for all tokens, which keeps
    every block. For tokens that converge slowly, right vectors of their own are pushed through the map. When the upper
    bounds would be within the tolerance for the assumed ||E||, a probabilistic certificate of ||E|| is computed; it
    ends the search, or says how large ||E|| is. For one map, some of the basis vectors are the certificate's, and it
    takes no columns. Lower bounds are rigorous, upper ones hold with probability 1 - `failure`.
    Where the basis spans the output space, both are rigorous and the result is exact.

    Left vectors have a non-negative product with `align_to`. A value may be from its upper bound `tolerance` times the
    value, or twice the rounding. A `block` is `krylov_block` wide by default. Columns end before
    `max_columns` are exceeded, with valid bounds; the first block and the probes are always used. `callback` is called
    with the number of columns so far, after each step. OptionError for a k that the map does not have, a tolerance that
    its dtype does not hold, or products in half precision.
    """
    d_out, length, d_in = op.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    check_tolerance(tolerance, op.dtype)
    block = block or krylov_block(k, 1 if joint else length)
    sketch = Sketch(op, min(block, d_out), joint=joint, seed=seed, probes=PROBES, tests=TESTS)
    basis, upper, eta = search(sketch, k, tolerance, max_columns, callback or (lambda _: None))

    # The basis is independent of these probes, so they measure what it misses, with or without a certificate.
    return conclude(sketch, basis, upper, eta, sketch.missing, k, align_to)


def conclude(
    sketch: Sketch,
    basis: BasisSVD,
    upper: Float[Tensor, "M k"],
    eta: Float[Tensor, " M"],
    missing: Float[Tensor, "M s"],
    k: int,
    align_to: Float[Tensor, " d_out"],
) -> SVD:
    """The k largest triples that a sketch has, with all that is known of their errors."""
    U, S, Vh, sines = sketch.triples(basis, k)
    failure = 0.0 if sketch.complete else FAILURE
    if not sketch.complete:
        eta = torch.minimum(eta, frobenius_bound(missing, FAILURE / 2))
        upper = torch.minimum(upper, upper_values(basis.values, basis.missed, eta)[:, :k])
    upper = upper.to(S)
    slack = sketch.floor * S[:, :1]
    # J v - s u = E v = E (I - F F^T) v, at most eta times the sine.
    residuals = eta[:, None].to(S) * sines + slack
    frobenius = frobenius_estimate(sketch, missing)[0].to(S)
    U, Vh = align_signs(U, Vh, align_to)
    lower, upper = (S - slack).clamp(min=0), torch.maximum(upper, S) + slack
    found = SVD(U, S, Vh, residuals, lower, upper, failure, frobenius, "matrix_free", sketch.columns)
    return as_joint(found, sketch.op.shape[1]) if sketch.joint else found


class _Search:
    """A search between its steps: bounds `upper` on values and `eta` on ||E||; `level` is ||E||^2 / scale^2."""

    def __init__(self, sketch: Sketch, k: int, tolerance: float, most: int | float, shared: int) -> None:
        self._sketch, self._k, self._tolerance, self._most, self._shared = sketch, k, tolerance, most, shared
        self._certificates, self._next_size, self._steps = 0, 0, 0
        self.level = _LEVEL
        self.upper = torch.full((sketch.maps, k), torch.inf, dtype=torch.float64, device=sketch.Q.device)
        self.eta = self.upper[:, 0]

    def look(self) -> None:
        """Decompose the sketch, and compute the bounds that follow for the values."""
        sketch, k = self._sketch, self._k
        self.basis, self.size = sketch.svd(), sketch.Q.shape[1]
        rounded = 2 * sketch.floor * self.basis.values[:, :1]
        self.scale = torch.maximum(self.basis.values[:, min(k, self.size) - 1], rounded[:, 0])
        # How far bounds may be from values [M, k]; they have rounding added later.
        self.allowed = torch.maximum(self._tolerance * self.basis.values[:, :k] - rounded, rounded)
        if self._certificates:  # a bound on ||E|| stays one while the basis grows
            bound = upper_values(self.basis.values, self.basis.missed, self.eta)[:, :k]
            self.upper = torch.minimum(self.upper, bound)

    def is_settled(self, bound: Tensor) -> bool:
        """Whether upper bounds are within the tolerance of the values."""
        return bool((bound[:, : self._k] - self.basis.values[:, : self._k] <= self.allowed).all())

    @property
    def is_certified(self) -> bool:
        """Whether the upper bounds that are proved are within the tolerance."""
        return self._certificates > 0 and self.is_settled(self.upper)

    def is_ready(self, assumed: Tensor, wanted: list[Tensor]) -> bool:
        """Whether the bounds would be within the tolerance at the present level, or no vector of single maps helps."""
        is_stuck = self._sketch.maps > 1 and self._steps >= self._shared and not any(part.numel() for part in wanted)
        return self.is_settled(assumed) or is_stuck

    def certify(self) -> bool:
        """Compute a certificate of ||E||, if it pays and there are columns for it; for one map it takes none."""
        sketch = self._sketch
        price = 0 if sketch.maps == 1 else 2 * math.prod(CERTIFICATE)
        is_large = self.size >= max(self._k, self._next_size) and self._steps > 0
        if not is_large or price >= sketch.Q.shape[0] - self.size or sketch.columns + price > self._most:
            return False
        self._certificates += 1
        # All certificates together fail with probability FAILURE / 2.
        if sketch.maps == 1:
            # One for each step that there might be: which are taken depends on the tests, too.
            self._next_size = self.size + 1
            failure = FAILURE / (4 * self._steps * (self._steps + 1))
            bound = frobenius_bound(sketch.missing, failure).clamp(max=sketch.bound_tested(self.basis, failure) ** 0.5)
        else:
            self._next_size = self.size + self.size // 4
            failure = FAILURE / 2 ** (self._certificates + 1)
            self.level = sketch.bound_missing(self.scale, _LEVEL, *CERTIFICATE, failure)
            bound = self.level**0.5 * self.scale
        self.eta = torch.minimum(self.eta, bound)
        return True

    def grow(self, wanted: list[Tensor]) -> bool:
        """Extend the basis by the step that helps most; False if that takes more columns than are left.

        The steps are: random vectors up to the whole output space, if that costs no more; a shared Krylov step; the
        vectors of single maps that are `wanted`.
        """
        sketch, pushes = self._sketch, sum(part.shape[1] for part in wanted)
        is_shared = sketch.maps == 1 or self._steps < self._shared or self.level > _TOO_LARGE or not pushes
        to_complete = sketch.Q.shape[0] - self.size
        cost = min(sketch.step_columns if is_shared else 2 * pushes, to_complete)
        if sketch.columns + cost > self._most:
            return False
        if cost == to_complete:
            sketch.grow(sketch.random(cost))
        elif is_shared:
            sketch.krylov_step()
            self._steps += 1
            if self.level > _TOO_LARGE:
                self.level = _LEVEL
        else:
            sketch.push_chosen(wanted)
        return True


def search(
    sketch: Sketch,
    k: int,
    tolerance: float,
    most: int | None,
    callback: Callable[[int], None],
    certify: bool = True,
    shared: int = _SHARED_STEPS,
) -> tuple[BasisSVD, Float[Tensor, "M k"], Float[Tensor, " M"]]:
    """Grow a sketch until the k largest values of all its maps are certified, or the columns are spent.

    Without `certify` it ends when the bounds would be within the tolerance if ||E||^2 were at most 0.35 s_k^2, which is
    not proved. Single tokens' vectors are pushed after so many `shared` steps. Returns the last decomposition, upper
    bounds on the maps' values (infinite without a certificate), and on ||E||.
    """
    state = _Search(sketch, k, tolerance, math.inf if most is None else most, shared)
    while True:
        callback(sketch.columns)
        state.look()
        if sketch.complete:  # E = 0, and the Ritz values are the maps' own
            return state.basis, state.basis.values[:, :k], torch.zeros_like(state.eta)
        if state.is_certified:
            return state.basis, state.upper, state.eta
        # What the upper bounds would be if ||E|| were as assumed, and which vectors would have to be pushed for less.
        assumed_eta = state.level**0.5 * state.scale
        assumed = upper_values(state.basis.values, state.basis.missed, assumed_eta)
        wanted = _choose_vectors(state.basis, state.allowed, state.level * state.scale.square())
        if state.is_ready(assumed, wanted):
            if not certify and state.size >= k:
                return state.basis, assumed[:, :k], assumed_eta
            if certify and state.certify():
                continue
        if not state.grow(wanted):
            return state.basis, state.upper, state.eta


@single_thread()
def _choose_vectors(basis: BasisSVD, allowed: Float[Tensor, "M k"], square: Float[Tensor, " M"]) -> list[Tensor]:
    """The right vectors to push if ||E||^2 is `square`: for each map coefficients `[m, c]` on its rows.

    They are the eigenvectors x of B^T B + eta^2 (I - F F^T) with values near s_k^2 or above, of which the part
    eta^2 x^T (I - F F^T) x is too large for the tolerance.
    """
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(bound_matrix(basis.values, basis.missed, square)))
    added = square[:, None] * (vectors * (basis.missed @ vectors)).sum(dim=1)
    smallest = basis.values[:, allowed.shape[1] - 1, None]
    wanted = (squares > _NEAR_K * smallest.square()) & (added > 0.5 * allowed[:, -1:] * smallest)
    # Right vectors V = B^T W diag(1 / values); those of values far below the k-th are too inexact to build on.
    inverse = torch.where(basis.values > 1e-3 * smallest, 1 / basis.values.clamp(min=1e-300), 0.0)
    parts = []
    for i in range(len(squares)):
        part = basis.W[i] @ (inverse[i, :, None] * vectors[i][:, wanted[i]])
        parts.append(part / part.norm(dim=0).clamp(min=1e-300))
    return parts


def frobenius_bound(missing: Float[Tensor, "M s"], failure: float) -> Float[Tensor, " M"]:
    """Bound all ||E_i||_F, except with probability `failure`, by |E_i^T g|^2 of Gaussian g independent of E.

    The sum of |E^T g|^2 is a sum of chi-squares with weights sigma_j(E)^2. Of all weights with the same sum, a single
    one makes a small value the likeliest (Roosta-Khorasani, Szekely & Ascher 2015). The tokens share the failure.
    """
    return (missing.sum(dim=1) / chi2_quantile(failure / len(missing), missing.shape[1])).sqrt()


def frobenius_estimate(sketch: Sketch, missing: Float[Tensor, "M s"]) -> tuple[Tensor, Tensor]:
    """||J_i||_F and its relative standard error, from |B|^2 + mean |E^T g|^2 (Hutchinson 1990; Hutch++, 2021)."""
    if sketch.complete:
        missing = missing.new_zeros(len(missing), 2)
    square = square_sums(sketch.B, 1) + missing.mean(dim=1)
    deviation = missing.std(dim=1) / missing.shape[1] ** 0.5
    return square.sqrt(), torch.where(square > 0, deviation / (2 * square), 0.0)
