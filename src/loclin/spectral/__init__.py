"""Spectra: singular values and vectors, norms and stable ranks, with their error bounds."""

from loclin.spectral.checks import check_fraction, check_rank, check_tolerance, least_tolerance, to_wide, wide_dtype
from loclin.spectral.dense import block_krylov_svd, gram_svd, join, lapack_svd, singular_values
from loclin.spectral.krylov import matrix_free_svd
from loclin.spectral.norms import Norms, effective_rank, stable_rank, stable_rank_and_norm
from loclin.spectral.result import NEAR_EQUAL, SVD
from loclin.spectral.ritz import RitzTriples, ritz_svd
from loclin.spectral.sketch import TokenMaps

__all__ = [
    "NEAR_EQUAL",
    "SVD",
    "Norms",
    "RitzTriples",
    "TokenMaps",
    "check_fraction",
    "check_rank",
    "check_tolerance",
    "effective_rank",
    "gram_svd",
    "join",
    "lapack_svd",
    "matrix_free_svd",
    "least_tolerance",
    "ritz_svd",
    "stable_rank",
    "stable_rank_and_norm",
    "block_krylov_svd",
    "singular_values",
    "wide_dtype",
    "to_wide",
]
