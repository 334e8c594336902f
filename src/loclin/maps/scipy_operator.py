"""A map as a `scipy.sparse.linalg.LinearOperator`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from loclin.errors import MissingExtraError
from loclin.spectral import TokenMaps, wide_dtype

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def as_scipy_operator(J: TokenMaps) -> LinearOperator:
    """J as an operator of shape (d_out, T d_in), with arrays on the CPU; MissingExtraError without SciPy."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingExtraError("to_scipy()", "SciPy", "scipy") from error
    d_out, length, d_in = J.shape
    dtype = wide_dtype(J.dtype)  # NumPy has no bfloat16

    def matmat(columns: np.ndarray) -> np.ndarray:
        block = torch.as_tensor(columns).T.reshape(-1, length, d_in)  # [T d_in, n] -> [n, T, d_in]
        return J.matmat(block).T.to("cpu", dtype).numpy()

    def rmatmat(columns: np.ndarray) -> np.ndarray:
        pulled = J.rmatmat(torch.as_tensor(columns).T.contiguous())
        return pulled.reshape(-1, length * d_in).T.to("cpu", dtype).numpy()  # [n, T, d_in] -> [T d_in, n]

    return LinearOperator(
        shape=(d_out, length * d_in),
        dtype=str(dtype).removeprefix("torch."),
        matvec=lambda x: matmat(x.reshape(-1, 1)).reshape(-1),
        rmatvec=lambda u: rmatmat(u.reshape(-1, 1)).reshape(-1),
        matmat=matmat,
        rmatmat=rmatmat,
    )
