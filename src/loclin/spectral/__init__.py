"""Spectra: singular values and vectors, norms, stable rank, and how far to trust them."""

from loclin.spectral.checks import check_rank, check_tolerance, least_tolerance, wide, widened
from loclin.spectral.dense import full, top, values
from loclin.spectral.krylov import krylov_svd
from loclin.spectral.norms import Estimate, Norms, effective_rank, frobenius, stable_rank, stable_rank_and_norm
from loclin.spectral.operator import DenseMaps, TokenMaps
from loclin.spectral.result import NEAR_EQUAL, SVD
from loclin.spectral.ritz import Ritz, ritz

__all__ = [
    "NEAR_EQUAL",
    "SVD",
    "DenseMaps",
    "Estimate",
    "Norms",
    "Ritz",
    "TokenMaps",
    "check_rank",
    "check_tolerance",
    "effective_rank",
    "frobenius",
    "full",
    "krylov_svd",
    "least_tolerance",
    "ritz",
    "stable_rank",
    "stable_rank_and_norm",
    "top",
    "values",
    "wide",
    "widened",
]
