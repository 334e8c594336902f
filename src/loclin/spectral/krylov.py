"""Spectra of token maps that are known by their products alone."""

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
from loclin.spectral.dense import shaped
from loclin.spectral.operator import TokenMaps
from loclin.spectral.result import SVD, aligned
from loclin.spectral.sketch import Ritz, Sketch
from loclin.spectral.threads import single_thread

FAILURE = 1e-3
"""The probability with which the bounds of one result may not hold."""

_POWERS = 2
"""Shared steps before single tokens' vectors are pushed."""
PROBES = 8
"""Gaussian vectors that measure the Frobenius norm of what the basis misses."""
CERTIFICATE = (4, 5)
"""Gaussian vectors and polynomial degree of the bound on what the basis misses: 40 columns, within 1.3 of the truth."""
_LEVEL = 0.35
"""The ||E||^2 / s_k^2 that is hoped for before anything is known of it."""
_REACH = 0.95
"""A value beyond the k-th is pushed too where its bound reaches this share of s_k^2."""
_HOPELESS = 0.8
"""From this ||E||^2 / s_k^2 on, pushing more vectors of single maps is worth less than a larger basis."""


@in_plain_torch
def krylov_svd(
    op: TokenMaps,
    k: int,
    *,
    towards: Float[Tensor, " d_out"],
    tolerance: float = 1e-3,
    joint: bool = False,
    block: int | None = None,
    max_columns: int | None = None,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
) -> SVD:
    """Find the k largest triples of each token's map, or with `joint` of all side by side, from products alone.

    A block Krylov method (Musco & Musco 2015; Tropp & Webber 2023) with one output basis for all tokens, QR and
    everything kept. Tokens that lag have their own right vectors pushed through the map and the images taken in. When
    the bounds would hold for the ||E|| hoped for, a probabilistic certificate of ||E|| is bought; it ends the search or
    says how far to go. Lower bounds are rigorous, upper ones hold up to `failure`, and are rigorous (and the result
    exact) where the basis has come to span the output space.

    Parameters
    ----------
    op
        The maps.
    k
        How many triples.
    towards
        The output vector that left vectors are turned to.
    tolerance
        How far a value may be from its upper bound, as a share of the value, or else twice what rounding leaves open.
    joint
        Decompose [J_0 ... J_{T-1}] instead of every J_i.
    block
        The block's width; k + 8 unless given.
    max_columns
        Stop before this many columns are passed, with honest bounds. The first block and the probes are always spent.
    seed
        Of all random vectors.
    callback
        Called with the columns spent so far, after each step.

    Raises
    ------
    OptionError
        For a k that the map does not have, a tolerance that its dtype does not hold, or products in half precision.
    """
    d_out, length, d_in = op.shape
    check_rank(k, d_out, length * d_in if joint else d_in)
    check_tolerance(tolerance, op.dtype)
    sketch = Sketch(op, min(block or k + 8, d_out), joint=joint, seed=seed)
    probes = sketch.random(PROBES)
    images = sketch.pull(probes)
    ritz, upper, eta = search(sketch, k, tolerance, max_columns, callback or (lambda _: None))

    # The basis was made without these probes, so that they say what it misses whether or not a certificate was had.
    missing = sketch.missing(probes, images)
    U, S, Vh, left = sketch.triples(ritz, k)
    failure = 0.0 if sketch.complete else FAILURE
    if not sketch.complete:
        eta = torch.minimum(eta, frobenius_bound(missing, FAILURE / 2))
        upper = torch.minimum(upper, upper_values(ritz.values, ritz.missed, eta)[:, :k])
    upper = upper.to(S)
    slack = sketch.floor * S[:, :1]
    # E v = E (I - F F^T) v.
    residuals = eta[:, None].to(S) * left + slack
    frobenius = frobenius_estimate(sketch, missing)[0].to(S)
    U, Vh = aligned(U, Vh, towards)
    found = SVD(
        U,
        S,
        Vh,
        residuals,
        (S - slack).clamp(min=0),
        torch.maximum(upper, S) + slack,
        failure,
        frobenius,
        "krylov",
        sketch.columns,
    )
    return shaped(found, length) if joint else found


def search(
    sketch: Sketch,
    k: int,
    tolerance: float,
    max_columns: int | None,
    callback: Callable[[int], None],
    certify: bool = True,
) -> tuple[Ritz, Float[Tensor, "M k"], Float[Tensor, " M"]]:
    """Grow a sketch until the k largest values of all its maps are certified, or the columns are spent.

    Without `certify` it ends where the bounds would hold if ||E||^2 were at most 0.35 s_k^2, which nothing proves.
    Returns the last Ritz values, upper bounds on the maps' own (infinite where nothing is certified), and on ||E||.
    """
    d_out, most = sketch.Q.shape[0], float("inf") if max_columns is None else max_columns
    level, attempts, tried = _LEVEL, 0, 0
    steps = 0
    upper = torch.full((sketch.maps, k), torch.inf, dtype=torch.float64, device=sketch.Q.device)
    eta = upper[:, 0]
    while True:
        callback(sketch.columns)
        ritz, size = sketch.ritz(), sketch.Q.shape[1]
        if sketch.complete:
            return ritz, ritz.values[:, :k], torch.zeros_like(eta)
        rounded = 2 * sketch.floor * ritz.values[:, :1]
        scale = torch.maximum(ritz.values[:, min(k, size) - 1], rounded[:, 0])
        allowed = torch.maximum(tolerance * ritz.values[:, :k] - rounded, rounded)  # the bounds add rounding later

        def settled(bound: Tensor, ritz: Ritz = ritz, allowed: Tensor = allowed) -> bool:
            return bool((bound[:, :k] - ritz.values[:, :k] <= allowed).all())

        # A bound on ||E|| that was bought stays one while the basis grows.
        if attempts:
            upper = torch.minimum(upper, upper_values(ritz.values, ritz.missed, eta)[:, :k])
            if settled(upper):
                return ritz, upper, eta
        hoped = upper_values(ritz.values, ritz.missed, level**0.5 * scale)
        wanted = _wanted(ritz, allowed, level * scale.square())
        pushes = sum(part.shape[1] for part in wanted)
        ready = settled(hoped) or (sketch.maps > 1 and steps >= _POWERS and not pushes)
        if ready and not certify and size >= k:
            return ritz, hoped[:, :k], level**0.5 * scale
        price = 2 * math.prod(CERTIFICATE)
        if certify and size >= max(k, tried) and ready and price < d_out - size and sketch.columns + price <= most:
            attempts, tried = attempts + 1, size + size // 4
            share = sketch.largest_missing(scale, _LEVEL, *CERTIFICATE, FAILURE / 2 ** (attempts + 1))
            eta = torch.minimum(eta, share**0.5 * scale)
            level = share
            continue

        shared = sketch.maps == 1 or steps < _POWERS or level > _HOPELESS or not pushes
        cost = 2 * (sketch.newest if shared else pushes)
        if cost >= d_out - size:
            cost = d_out - size
        if sketch.columns + cost > most:
            return ritz, upper, eta
        if cost == d_out - size:
            sketch.grow(sketch.random(cost))
        elif shared:
            sketch.power()
            level, steps = (_LEVEL if level > _HOPELESS else level), steps + 1
        else:
            sketch.polish(wanted)


@single_thread()
def _wanted(ritz: Ritz, allowed: Float[Tensor, "M k"], square: Float[Tensor, " M"]) -> list[Tensor]:
    """What to push if ||E||^2 is `square`: for each map `[m, c]`, the directions of which the upper bounds are made."""
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(bound_matrix(ritz.values, ritz.missed, square)))
    added = square[:, None] * (vectors * (ritz.missed @ vectors)).sum(dim=1)
    smallest = ritz.values[:, allowed.shape[1] - 1, None]
    wanted = (squares > _REACH * smallest.square()) & (added > 0.5 * allowed[:, -1:] * smallest)
    # Values far below the k-th have right vectors that are too inexact to build on.
    inverse = torch.where(ritz.values > 1e-3 * smallest, 1 / ritz.values.clamp(min=1e-300), 0.0)
    parts = []
    for i in range(len(squares)):
        part = ritz.W[i] @ (inverse[i, :, None] * vectors[i][:, wanted[i]])
        parts.append(part / part.norm(dim=0).clamp(min=1e-300))
    return parts


def frobenius_bound(missing: Float[Tensor, "M s"], failure: float) -> Float[Tensor, " M"]:
    """Bound all ||E_i||_F, up to `failure`, by |E_i^T g|^2 of Gaussian vectors that E is independent of.

    Their sum is a sum of chi-squares weighted by sigma_j(E)^2. Of all weights with a given sum, it is a single one that
    makes a small value the likeliest (Roosta-Khorasani, Szekely & Ascher 2015), and the tokens share the failure.
    """
    return (missing.sum(dim=1) / chi2_quantile(failure / len(missing), missing.shape[1])).sqrt()


def frobenius_estimate(sketch: Sketch, missing: Float[Tensor, "M s"]) -> tuple[Tensor, Tensor]:
    """||J_i||_F and its relative standard error, both `[M]`: deflated Hutchinson (Meyer et al. 2021, Hutch++)."""
    if sketch.complete:
        missing = torch.zeros_like(missing)
    square = square_sums(sketch.B, 1) + missing.mean(dim=1)
    deviation = missing.std(dim=1) / missing.shape[1] ** 0.5
    return square.sqrt(), torch.where(square > 0, deviation / (2 * square), 0.0)
