"""Sums of squares of large tensors in float64, and a check for numbers that are not finite.

PyTorch's own norms are summed in the tensor's dtype. For the 2.3 million float32 numbers of a 576 x 4032 matrix they
are too small by about 3e-4, always in the same direction, so they cannot be used for bounds.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from loclin.errors import OptionError

_CHUNK, _CHUNK_ACCELERATOR = 2**15, 2**22
"""How many numbers are converted at a time: on a CPU as many as fit its cache."""
most_steps: ContextVar[int | None] = ContextVar("most_steps", default=None)
"""How many steps a tensor may take, where work is only counted: a step takes its time, however small it is."""


def square_sums(x: Tensor, axis: int = 0) -> Tensor:
    """Sums of squares over `axis` and all later axes, in float64, without a copy of all of `x`."""
    chunk = _CHUNK if x.device.type == "cpu" else _CHUNK_ACCELERATOR
    total = x.new_zeros(x.shape[:axis], dtype=torch.float64)
    summed = tuple(range(axis, x.dim()))
    n = x.shape[axis]
    step = max(1, chunk * n // max(1, x.numel()), n // (most_steps.get() or max(1, n)))
    for part in x.detach().split(step, dim=axis):
        total += part.to(torch.float64, copy=True).square_().sum(dim=summed)
    return total


def norms(x: Tensor, axis: int = 0) -> Tensor:
    """Euclidean (Frobenius) norms over `axis` and all later axes, in float64."""
    return square_sums(x, axis).sqrt()


def relative_error(difference: Tensor, reference: Tensor) -> float:
    """|difference| / |reference|, Euclidean norms over everything; 0 / 0 is 0."""
    return (norms(difference) / norms(reference).clamp_min(torch.finfo(torch.float64).tiny)).item()


def refuse_non_finite(name: str, vector: Tensor) -> None:
    """Refuse a vector with NaN or infinite numbers, by an OptionError: every product with it would have them too."""
    bad = int((~vector.isfinite()).sum()) if vector.is_floating_point() else 0
    if bad:
        raise OptionError(f"{name} has {bad} of {vector.numel()} numbers that are NaN or infinite: give finite ones")
