"""The frozen coefficients of one layer as plain tensors: what explicit products are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loclin.common.brief import brief


@dataclass(frozen=True)
class LayerCoefficients:
    """The frozen coefficients of one layer: norms `[T, d]`, the MLP's branches `[T, f]`, attention `[H, T, T]`.

    `attn_in` and `mlp_in` are the norms before attention and MLP, `attn_out` and `mlp_out` those behind them. None
    where there is no such norm, or nothing flows through a branch.
    """

    attn_in: Tensor | None
    attn_out: Tensor | None
    mlp_in: Tensor | None
    mlp_out: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    probs: Tensor

    __repr__ = brief

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(factors.nbytes for factors in vars(self).values() if factors is not None)

    def to(self, dtype: torch.dtype) -> LayerCoefficients:
        """The same in another dtype."""
        return replace(self, **{name: part.to(dtype) for name, part in vars(self).items() if part is not None})
