"""A linear module's weight and bias in a sweep, whose dtype may be wider than that in which the weight is stored.

Where few rows pass a layer, each weight is widened some rows at a time, in the processor's cache. For more rows, or
chunk after chunk of them, it is widened once as a whole, into memory that the next layer uses again. Where products are
split (`loclin.network.split`), it is used as bfloat16 holds it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.freeze.narrow import is_narrow, multiply, multiply_transposed
from loclin.network import split
from loclin.network.blocks import Workspace, add_or_write

_FEW_ROWS = 256


class Matrix:
    """W `[out, in]` and its bias; wide copies are in the workspace under `name`, for one layer at a time.

    `used`: that the first product is another's already, on another device.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        workspace: Workspace,
        is_split: bool = False,
        used: bool = False,
    ) -> None:
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.shape, self.device = weight.shape, weight.device
        self.empty = weight.new_empty(0, dtype=dtype)
        self._name, self._weight, self._workspace = name, weight, workspace
        self._narrow, self._used = is_narrow(weight, dtype), used
        self.is_split = is_split

    @cached_property
    def whole(self) -> Float[Tensor, "out in"]:
        """W in the sweep's dtype. Cost: one conversion, if it is stored in another."""
        if not self._narrow:
            return self._weight.to(self.empty.dtype)
        return self._workspace(f"weight {self._name}", self.empty, *self.shape).copy_(self._weight)

    @cached_property
    def _factor(self) -> Float[Tensor, "out in"]:
        """W as split products take it."""
        dtype = split.piece_dtype(self.device)
        return self.whole if dtype == self.empty.dtype else self._weight.to(dtype)

    def push(self, x: Float[Tensor, "*n in"], out: Tensor | None = None, affine: bool = False) -> Tensor:
        """`x W^T` `[*n, out]`, with `affine` plus the bias; where it is made whole, in `out`, for rows `[n, in]`."""
        bias = self.bias if affine else None
        if self.is_split and not affine:
            return self._multiply(x, self._factor.T, out)
        if self._goes_by_rows(x):
            pushed = multiply(x, self._weight)
            return pushed if bias is None else pushed.add_(bias)
        return nn.functional.linear(x, self.whole, bias) if out is None else torch.mm(x, self.whole.T, out=out)

    def pull(self, y: Float[Tensor, "*n out"], out: Tensor | None = None) -> Tensor:
        """`y W` `[*n, in]`; where it is made whole, in `out`, for rows `[n, out]`."""
        if self.is_split:
            return self._multiply(y, self._factor, out)
        if self._goes_by_rows(y):
            return multiply_transposed(y, self._weight)
        return y @ self.whole if out is None else torch.mm(y, self.whole, out=out)

    def pull_into(self, y: Float[Tensor, "n out"], out: Float[Tensor, "n in"], add: bool) -> None:
        """`y W` in `out`, or added to it."""
        if self.is_split:
            split.multiply(y, self._factor, self._workspace, out, add)
        elif self._goes_by_rows(y):
            add_or_write(out, multiply_transposed(y, self._weight), add)
        elif add:
            torch.addmm(out, y, self.whole, out=out)  # unlike addmm_, counted where flops are
        else:
            torch.mm(y, self.whole, out=out)

    def _multiply(self, x: Float[Tensor, "*n k"], factor: Float[Tensor, "k m"], out: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), factor.shape[1]) if out is None else out
        return split.multiply(rows, factor, self._workspace, out).view(*x.shape[:-1], -1)

    def _goes_by_rows(self, block: Tensor) -> bool:
        """Whether to widen some rows at a time: for the first product of this layer, if it has few rows."""
        first, self._used = not self._used, True
        return self._narrow and first and "whole" not in vars(self) and block.numel() <= _FEW_ROWS * block.shape[-1]
