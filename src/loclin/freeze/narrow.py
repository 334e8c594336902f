"""Products of the linear path with weights that are stored in a narrower dtype, such as bfloat16 with float32.

A widened copy of a large weight takes twice its memory, and its fresh pages cost more than the product. So some rows of
it are widened at a time, into one buffer that stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.common.sums import most_steps

_NUMBERS = 2**19  # of the weight that are widened at a time
_NUMBERS_ACCELERATOR = 2**26


def is_narrow(weight: Any, dtype: torch.dtype) -> bool:
    """Whether something is a plain matrix of floats that has to be widened to a dtype."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > 0 and not weight.is_meta
    return plain and weight.is_floating_point() and 1 < weight.dtype.itemsize < dtype.itemsize


def multiply(x: Float[Tensor, "*n in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*n out"]:
    """`x W^T` in the dtype of x, without a graph. Memory: some rows of W."""
    # Only operations that torch knows for blocks: x may be one, of `is_grads_batched`.
    return torch.cat([x @ rows.T for _, rows in _widened_rows(weight, x.dtype)], dim=-1)


def multiply_transposed(y: Float[Tensor, "*n out"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*n in"]:
    """`y W` in the dtype of y, without a graph. Memory: some rows of W."""
    total = None
    for start, rows in _widened_rows(weight, y.dtype):
        part = y.narrow(-1, start, len(rows)) @ rows
        total = part if total is None else total + part
    assert total is not None
    return total


def _widened_rows(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(the first of some rows, these rows in a dtype), each time in the same memory."""
    numbers = _NUMBERS if weight.device.type == "cpu" else _NUMBERS_ACCELERATOR
    step = max(1, numbers // weight.shape[1], len(weight) // (most_steps.get() or len(weight)))
    buffer = torch.empty(min(step, len(weight)), weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, len(weight), step):
        some = weight[start : start + step]
        yield start, buffer[: len(some)].copy_(some)


class _Product(torch.autograd.Function):
    """`x W^T`, or with `transposed` `x W`, whose graph holds W as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """Compute the product; autograd refuses the graph if the weight changes."""
        ctx.save_for_backward(weight)
        ctx.transposed = transposed
        return (multiply_transposed if transposed else multiply)(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The product with the other transpose."""
        (weight,) = ctx.saved_tensors
        pulled = _Product.apply(gradients[0], weight, not ctx.transposed)  # type: ignore[no-untyped-call]
        return pulled, None, None


def linear(x: Float[Tensor, "*n in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*n out"]:
    """`x W^T` in the dtype of x, with a graph that can be differentiated twice. Memory: the result, some rows of W."""
    product: Tensor = _Product.apply(x, weight, False)  # type: ignore[no-untyped-call]
    return product
