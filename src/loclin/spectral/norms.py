"""Norms and ranks of token maps, from products alone or from singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.spectral.checks import check_tolerance
from loclin.spectral.krylov import FAILURE, PROBES, frobenius_estimate, search
from loclin.spectral.operator import TokenMaps
from loclin.spectral.sketch import Sketch

_BLOCK = 16


@dataclass(frozen=True)
class Norms:
    """Norms of each token's map; everything is `[T]`.

    Attributes
    ----------
    largest, frobenius, stable_rank
        sigma_1, ||J_i||_F and ||J_i||_F^2 / sigma_1^2.
    largest_error
        How far sigma_1 may be above `largest`, relative; holds up to `failure`.
    frobenius_error
        The relative standard error of `frobenius`.
    failure, columns
        The probability of a wrong bound, and what products have cost.
    """

    largest: Tensor
    frobenius: Tensor
    stable_rank: Tensor
    largest_error: Tensor
    frobenius_error: Tensor
    failure: float
    columns: int

    __repr__ = brief

    @property
    def stable_rank_error(self) -> Tensor:
        """The relative error of the stable rank that the two others leave open."""
        return 2 * (self.largest_error + self.frobenius_error)


@dataclass(frozen=True)
class Estimate:
    """A value `[T]`, its relative standard error `[T]`, and the columns it took."""

    value: Tensor
    error: Tensor
    columns: int

    __repr__ = brief


def frobenius(op: TokenMaps, *, tolerance: float = 0.01, seed: int = 0) -> Estimate:
    """||J_i||_F of all tokens: a shared basis takes the large part exactly, and Gaussian probes what it misses.

    Deflated Hutchinson (Hutchinson 1990; Meyer et al. 2021, Hutch++). Cost: 24 columns, and 32 for each step until
    every token's relative standard error is at most `tolerance`; the values are exact where the basis is complete.
    """
    sketch = Sketch(op, min(_BLOCK, op.shape[0]), seed=seed)
    probes = sketch.random(PROBES)
    images = sketch.pull(probes)
    value, error = _refined(sketch, probes, images, tolerance)
    return Estimate(value.to(sketch.B), error.to(sketch.B), sketch.columns)


def _refined(sketch: Sketch, probes: Tensor, images: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """||J_i||_F and its relative standard error, the sketch grown until that is within the tolerance."""
    while True:
        value, error = frobenius_estimate(sketch, sketch.missing(probes, images))
        if sketch.complete or (error <= tolerance).all():
            return value, error
        sketch.power()


@in_plain_torch
def stable_rank_and_norm(op: TokenMaps, *, tolerance: float = 0.02, certify: bool = True, seed: int = 0) -> Norms:
    """sigma_1, ||J_i||_F and stable rank of all tokens to a relative tolerance, from one basis and its probes.

    The stable rank takes twice the relative errors of both norms, so each of these gets a quarter of the tolerance.
    With `certify=False` sigma_1 is not certified, which saves the certificate's columns: `largest_error` then holds if
    the directions that were never pushed hold no singular value above 0.6 sigma_1, and `failure` is 1.

    Raises
    ------
    OptionError
        For a tolerance that the map's dtype does not hold.
    """
    check_tolerance(tolerance / 4, op.dtype)
    sketch = Sketch(op, min(_BLOCK, op.shape[0]), seed=seed)
    probes = sketch.random(PROBES)
    images = sketch.pull(probes)
    ritz, upper, _ = search(sketch, 1, tolerance / 4, None, lambda _: None, certify)
    norm, norm_error = _refined(sketch, probes, images, tolerance / 4)
    largest = ritz.values[:, 0]
    slack = sketch.floor * largest
    above = torch.where(largest > 0, (upper[:, 0] + slack - largest) / largest, 0.0)
    rank = stable_rank(norm, largest)
    largest, norm, rank, above, norm_error = (part.to(sketch.B) for part in (largest, norm, rank, above, norm_error))
    failure = 0.0 if sketch.complete else FAILURE if certify else 1.0
    return Norms(largest, norm, rank, above, norm_error, failure, sketch.columns)


def stable_rank(frobenius: Float[Tensor, "*T"], largest: Float[Tensor, "*T"]) -> Float[Tensor, "*T"]:
    """||J||_F^2 / sigma_1^2 (paper, section 3.5); 0 for a zero map, whose rank is 0."""
    return torch.where(largest > 0, (frobenius / largest.clamp_min(torch.finfo(largest.dtype).tiny)).square(), 0.0)


@in_plain_torch
def effective_rank(values: Float[Tensor, "*T r"]) -> Float[Tensor, "*T"]:
    """The exponential of the entropy of the singular values over their sum (Roy & Vetterli 2007); 0 for a zero map."""
    total = values.sum(dim=-1)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-1)
    return torch.where(total > 0, torch.special.entr(shares).sum(dim=-1).exp(), 0.0)
