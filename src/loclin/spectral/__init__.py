"""Spectra: singular values and vectors, norms, stable rank, and how far to trust them."""

from loclin.spectral.svd import NEAR_EQUAL, SVD, check_rank, stable_rank, svd

__all__ = ["NEAR_EQUAL", "SVD", "check_rank", "stable_rank", "svd"]
