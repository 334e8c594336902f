"""Norms, stable and effective ranks of token maps: matrix-free, or from singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.surroundings import in_plain_torch
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.spectral.checks import check_tolerance
from loclin.spectral.krylov import FAILURE, TESTS, frobenius_estimate, search
from loclin.spectral.sketch import Sketch, TokenMaps

_BLOCK, _PROBES = 24, 64  # what all tokens share, in one wide sweep; each column is cheap there


@dataclass(frozen=True)
class Norms(Result):
    """Norms of each token's map; everything is `[T]`.

    Attributes
    ----------
    largest, frobenius, stable_rank: sigma_1, ||J_i||_F and ||J_i||_F^2 / sigma_1^2.
    largest_error: how far sigma_1 may be above `largest`, relative; holds with probability 1 - `failure`.
    frobenius_error: the relative standard error of `frobenius`.
    failure, columns: the probability of a wrong bound, and the columns that products took.
    provenance, warnings: which map this is of, and warnings about the prompt.
    """

    largest: Tensor
    frobenius: Tensor
    stable_rank: Tensor
    largest_error: Tensor
    frobenius_error: Tensor
    failure: float
    columns: int
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per token."""
        names = ("largest", "frobenius", "stable_rank", "largest_error", "frobenius_error")
        tokens = range(len(self.largest)) if self.provenance is None else self.provenance.positions
        texts = {} if self.provenance is None else {"text": [self.provenance.tokens[token] for token in tokens]}
        return {"token": list(tokens), **texts, **{name: getattr(self, name).tolist() for name in names}}

    @property
    def stable_rank_error(self) -> Tensor:
        """The relative error of the stable rank, from those of the two norms."""
        return 2 * (self.largest_error + self.frobenius_error)


def _refine_frobenius(sketch: Sketch, tolerance: float) -> tuple[Tensor, Tensor]:
    """Take probes or Krylov steps until ||J_i||_F has a relative standard error within the tolerance; both are `[T]`.

    The error falls with the square root of the number of probes: they are added where that takes fewer columns.
    """
    while True:
        value, error = frobenius_estimate(sketch, sketch.missing)
        if sketch.complete or (error <= tolerance).all():
            return value, error
        wanted = sketch.missing.shape[1] * (1.05 * (error.max().item() / tolerance) ** 2 - 1)
        if wanted <= sketch.step_columns:
            sketch.add_probes(math.ceil(wanted))
        else:
            sketch.krylov_step()


@in_plain_torch
def stable_rank_and_norm(op: TokenMaps, *, tolerance: float = 0.02, certify: bool = True, seed: int = 0) -> Norms:
    """sigma_1, ||J_i||_F and stable rank of all tokens to a relative tolerance, from one basis and its probes.

    The stable rank has twice the relative errors of both norms, so each of these gets a quarter of the tolerance. With
    `certify=False` sigma_1 is not certified, which saves the certificate's columns: `largest_error` then holds if no
    singular value above 0.6 sigma_1 is outside of what was pushed, and `failure` is 1. OptionError for a tolerance that
    the map's dtype does not hold.
    """
    check_tolerance(tolerance / 4, op.dtype)
    sketch = Sketch(op, min(_BLOCK, op.shape[0]), seed=seed, probes=_PROBES, tests=TESTS)
    basis, upper, _ = search(sketch, 1, tolerance / 4, None, lambda _: None, certify, shared=1)
    norm, norm_error = _refine_frobenius(sketch, tolerance / 4)
    largest = basis.values[:, 0]
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
