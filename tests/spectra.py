"""Random token maps with designed spectra, and dense maps that count their products."""

from __future__ import annotations

import torch
from torch import Tensor


def maps(d_out: int, d_in: int, spectra: list[Tensor], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense `[d_out, T, d_in]` whose token i has the singular values `spectra[i]`."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q

    parts = [orthonormal(d_out, len(s)) * s.double() @ orthonormal(d_in, len(s)).T for s in spectra]
    return torch.stack(parts, dim=1).to(dtype)


def power_law(count: int, exponent: float, scale: float = 1.0) -> Tensor:
    return scale * torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def true_values(dense: Tensor, joint: bool = False) -> Tensor:
    dense = dense.double()
    return torch.linalg.svdvals(dense.flatten(1) if joint else dense.transpose(0, 1))


DESIGNS = {
    "fast": [2.0 ** -torch.arange(48.0), 0.6 ** torch.arange(48.0)],
    "slow": [power_law(48, 0.6), power_law(48, 1.2, 1e3)],
    "near-equal": [torch.cat([torch.tensor([3.0, 2.999999, 2.0, 2.0]), power_law(44, 1)]), torch.ones(48)],
    "deficient": [power_law(3, 1), power_law(48, 0.8)],
    "zero": [torch.zeros(48), power_law(48, 0.8)],
    "rank 1": [torch.eye(48)[0]],
    "one token": [power_law(48, 0.8)],
}


class DenseMaps:
    """The token maps of a dense tensor `[d_out, T, d_in]`; `columns` counts their products."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense
        self.columns = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        d_out, length, d_in = self.dense.shape
        return d_out, length, d_in

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.dense.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensor lives."""
        return self.dense.device

    def matmat(self, Xs: Tensor) -> Tensor:
        """sum_i J_i x_i of n blocks of vectors. Cost: n columns, 2 n d_out T d_in flops."""
        self.columns += len(Xs)
        return Xs.flatten(1) @ self.dense.flatten(1).T

    def rmatmat(self, Us: Tensor) -> Tensor:
        """Every J_i^T u of n vectors. Cost: n columns, 2 n d_out T d_in flops."""
        self.columns += len(Us)
        return (Us @ self.dense.flatten(1)).unflatten(1, self.dense.shape[1:])
