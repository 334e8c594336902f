"""Singular triples of all tokens' maps side by side in seven products: for maps whose every product reads a disk.

Randomized block Krylov (Musco & Musco 2015) with a wide block and two steps takes five products; three more, of which
the first goes with the last of those, certify what the basis misses. The narrow blocks of `loclin.spectral.krylov` need
a third of the columns, and twenty products and more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.surroundings import in_plain_torch
from loclin.spectral.bounds import chebyshev_bound, upper_values
from loclin.spectral.checks import check_rank, check_tolerance
from loclin.spectral.krylov import FAILURE, conclude
from loclin.spectral.result import SVD
from loclin.spectral.sketch import Sketch, TokenMaps

SWEEPS = 7
_WIDER = 8  # times the narrow block of k + 8: the gaps that two steps need
_PROBES = 16
_LEVEL = 0.1  # the ||E||^2 / s_k^2 below which the certificate's polynomial is small


def wide_columns(k: int, d_out: int) -> int:
    """How many columns the seven products have together."""
    block = min(_WIDER * (k + 8), d_out)
    return min(5 * block, block + 2 * (d_out - block)) + 3 * _PROBES


@in_plain_torch
def few_sweeps_svd(
    op: TokenMaps, k: int, *, align_to: Float[Tensor, " d_out"], tolerance: float = 1e-3, seed: int = 0
) -> SVD:
    """Find the k largest triples of [J_0 ... J_{T-1}] in seven products, whatever tolerance they reach.

    The bounds in the result are those of `loclin.spectral.matrix_free_svd`, and so are its errors. Cost:
    `wide_columns`. Memory: 24 (k + 8) vectors of the input space.
    """
    d_out, length, d_in = op.shape
    check_rank(k, d_out, length * d_in)
    check_tolerance(tolerance, op.dtype)
    sketch = Sketch(op, min(_WIDER * (k + 8), d_out), joint=True, seed=seed)
    probes = sketch.random(_PROBES)
    for some in (None, probes):
        if not sketch.complete:
            sketch.krylov_step(some)
    basis = sketch.svd()
    eta, missing = torch.zeros_like(basis.values[:, 0]), sketch.B.new_zeros(1, _PROBES)
    if not sketch.complete:
        level = _LEVEL * basis.values[0, k - 1].clamp(min=torch.finfo(torch.float64).tiny).square()
        missing, eta = sketch.probed.double().square().sum(dim=-1), _bound_missing(sketch, probes, level).sqrt()[None]
    upper = upper_values(basis.values, basis.missed, eta)[:, :k]
    return conclude(sketch, basis, upper, eta, missing, k, align_to)


def _bound_missing(sketch: Sketch, probes: Tensor, level: Tensor) -> Tensor:
    """Bound ||E||_2^2, except with probability FAILURE / 2.

    By the Chebyshev polynomial of degree 3 of sqrt(E E^T / level): with E scaled by 1 / sqrt(level), w_1 = E^T g,
    w_2 = 2 E w_1 - g and w_3 = 2 E^T w_2 - w_1.
    """
    scale, one = 1 / level.sqrt(), torch.ones_like(level)[None]
    first = sketch.probed * scale.to(sketch.probed)
    second = 2 * scale.to(first) * sketch.project_out(sketch.push(first, one)) - sketch.project_out(probes)
    third = 2 * scale.to(first) * sketch.pull(second) - first
    squares = third.double().square().sum().item()
    return level * chebyshev_bound(squares, 1.5, 1.0, len(probes.T), FAILURE / 2)
