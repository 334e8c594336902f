"""Blocks of vectors on their way through explicit products, and the memory that these share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Started(NamedTuple):
    """A block `[S, n, d]` whose first row belongs to position `start`: what comes before is zero."""

    start: int
    block: Tensor


class Tap(NamedTuple):
    """Looks at what attention and MLP give at one position: `see(which block, point, which columns, [n, d])`."""

    position: int
    see: Callable[[int, str, slice, Tensor], None]


def adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """Several `[n, d]` as one `[len(parts) n, d]`, where they lie in memory one behind the other; else None."""
    first, n = parts[0], parts[0].shape[0]
    step = n * first.stride(0) * first.itemsize
    if any(part.stride() != first.stride() or part.shape != first.shape for part in parts):
        return None
    if any(part.data_ptr() != first.data_ptr() + i * step for i, part in enumerate(parts)):
        return None
    return first.as_strided((len(parts) * n, first.shape[1]), first.stride())


class Workspace:
    """Memory that every layer of a sweep uses again: fresh pages for each product would cost as much as the product."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor; the one given under this name before is overwritten."""
        numbers = math.prod(shape)
        room = self._rooms.get(name)
        if room is None or room.numel() < numbers or room.dtype != like.dtype or room.device != like.device:
            room = self._rooms[name] = like.new_empty(numbers)
        return room[:numbers].view(shape)


def add_scaled(block: Tensor, moved: Tensor, factors: Tensor | None) -> None:
    """Add to the residual stream, factors first, wherever the block lives."""
    if factors is None:
        block += moved.to(block.device)
    else:
        block.addcmul_(moved.to(block.device), factors.to(block.device))


def deliver(block: Tensor, moved: Tensor, onto: bool) -> None:
    """Add to the residual stream, or write in its place."""
    if onto:
        block += moved.to(block.device)
    else:
        block.copy_(moved)


def groups(positions: slice, size: int) -> list[slice]:
    """Neighbouring positions, so many at a time."""
    return [slice(t, min(t + size, positions.stop)) for t in range(positions.start, positions.stop, size)]
