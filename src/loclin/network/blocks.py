"""What explicit products are made of: frozen coefficients, blocks of vectors, and the memory that a sweep reuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.freeze.pattern import Pattern


@dataclass(frozen=True)
class LayerCoefficients:
    """The frozen coefficients of one layer; None where there is no such norm, or nothing flows through a branch."""

    attn_in: Tensor | None  # [T, d], the norm before attention
    attn_out: Tensor | None  # [T, d], the norm behind it
    mlp_in: Tensor | None
    mlp_out: Tensor | None
    up: Tensor | None  # [T, f], a branch of the MLP
    gate: Tensor | None
    pattern: Pattern  # attention

    __repr__ = brief

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(factors.nbytes for factors in vars(self).values() if factors is not None)

    def to(self, dtype: torch.dtype) -> LayerCoefficients:
        """The same in another dtype."""
        return replace(self, **{name: part.to(dtype) for name, part in vars(self).items() if part is not None})

    def on(self, device: torch.device) -> LayerCoefficients:
        """The same on another device."""
        parts = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, pattern=self.pattern.on(device), **parts)


class CausalBlock(NamedTuple):
    """A block `[S, n, d]` whose first row belongs to position `start`; at all positions before, it is zero."""

    start: int
    block: Tensor


class Probe(NamedTuple):
    """Records what attention and MLP give at one position: `record(block, point, columns, values [n, d])`."""

    position: int
    record: Callable[[int, str, slice, Tensor], None]


def contiguous_view(parts: Sequence[Tensor]) -> Tensor | None:
    """Several `[n, d]` as one `[len(parts) n, d]`, if each begins in memory where the one before it ends; else None."""
    first, n = parts[0], parts[0].shape[0]
    step = n * first.stride(0) * first.itemsize
    if any(part.stride() != first.stride() or part.shape != first.shape for part in parts):
        return None
    if any(part.data_ptr() != first.data_ptr() + i * step for i, part in enumerate(parts)):
        return None
    return first.as_strided((len(parts) * n, first.shape[1]), first.stride())


class Workspace:
    """Buffers that every layer of a sweep reuses: fresh pages for each product would cost as much as the product.

    `checked`: whether the sweep has checked the weights of all its layers.
    """

    def __init__(self) -> None:
        self.checked = False
        self._buffers: dict[str, Tensor] = {}
        self._others: dict[int, Workspace] = {}

    def of(self, worker: int) -> Workspace:
        """The buffers of another worker, which uses them at the same time."""
        return self._others.setdefault(worker, Workspace())

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor; the one returned before under this name is overwritten."""
        numbers = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numbers or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = like.new_empty(numbers)
        return buffer[:numbers].view(shape)


def add_or_write(block: Tensor, moved: Tensor, add: bool) -> None:
    """Add to the residual stream, or write in its place."""
    if add:
        block += moved.to(block.device)
    else:
        block.copy_(moved)
