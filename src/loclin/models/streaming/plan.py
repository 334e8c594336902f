"""How a parameter is put together from stored tensors: a conversion of transformers, run on places, not on values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.models.streaming.checkpoint import ALIGNMENT, Bytes, Checkpoint, StoredTensor

_View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """A tensor that is computed from stored ones, as a quantised weight is."""

    name: str
    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]
    """Computes it from the parts."""

    __repr__ = brief

    @property
    def path(self) -> Path:
        """The file of its first part."""
        return self.parts[0].path


class Places:
    """A tensor that consists of stored ones: its shape, and which view of it each of them fills.

    It stands for a tensor in conversions that stack, concatenate and transpose; TypeError in others.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[tuple[StoredTensor | Packed, tuple[_View, ...]]]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)

    @classmethod
    def of(cls, stored: StoredTensor | Packed) -> Places:
        """A stored tensor as it is."""
        return cls(stored.shape, [(stored, ())])

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[Any, Callable[..., Places]] = {
            torch.stack: _stack,
            torch.cat: _concatenate,
            torch.transpose: _transpose,
        }
        return known[function](*args, **(kwargs or {})) if function in known else NotImplemented

    def contiguous(self) -> Places:
        """Itself: the parameter will be contiguous."""
        return self

    def plan(self, dtype: torch.dtype) -> Plan:
        """Where in a parameter of this shape its pieces go."""
        whole = torch.empty(self.shape, device="meta")
        pieces = []
        for stored, steps in self.pieces:
            view = whole
            for step in steps:
                view = step(view)
            pieces.append(Piece(stored, int(view.storage_offset()), view.stride(), view.is_contiguous()))
        return Plan(tuple(pieces), tuple(self.shape), dtype)

    def _inside(self, view: _View) -> list[tuple[StoredTensor | Packed, tuple[_View, ...]]]:
        """Its pieces in a larger tensor, of which it is this view."""
        return [(stored, (view, *steps)) for stored, steps in self.pieces]


def _stack(parts: Sequence[Places], dim: int = 0) -> Places:
    (shape,) = {tuple(part.shape) for part in parts}
    pieces = [piece for i, part in enumerate(parts) for piece in part._inside(partial(torch.select, dim=dim, index=i))]
    return Places([*shape[:dim], len(parts), *shape[dim:]], pieces)


def _concatenate(parts: Sequence[Places], dim: int = 0) -> Places:
    (before,), (behind,) = ({tuple(part.shape[cut]) for part in parts} for cut in (slice(dim), slice(dim + 1, None)))
    start, pieces = 0, []
    for part in parts:
        pieces += part._inside(partial(torch.narrow, dim=dim, start=start, length=part.shape[dim]))
        start += part.shape[dim]
    return Places([*before, start, *behind], pieces)


def _transpose(part: Places, dim0: int, dim1: int) -> Places:
    swap = partial(torch.transpose, dim0=dim0, dim1=dim1)
    return Places(swap(torch.empty(part.shape, device="meta")).shape, part._inside(swap))


@dataclass(frozen=True)
class Piece:
    """A stored tensor as a strided part of a parameter, in numbers of elements."""

    stored: StoredTensor | Packed
    start: int
    stride: tuple[int, ...]
    contiguous: bool

    __repr__ = brief

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What is read for it."""
        return self.stored.parts if isinstance(self.stored, Packed) else (self.stored,)

    def of(self, parameter: Tensor) -> Tensor:
        """That part."""
        return parameter.as_strided(self.stored.shape, self.stride, parameter.storage_offset() + self.start)


@dataclass(frozen=True)
class Plan:
    """What a parameter is read from, and what it becomes."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    __repr__ = brief

    @property
    def name(self) -> str:
        """The stored name of its first piece."""
        return self.pieces[0].stored.name

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """How many bytes it takes in the files."""
        return sum(part.nbytes for piece in self.pieces for part in piece.parts)

    @property
    def staged_bytes(self) -> int:
        """The memory that its pieces pass through which cannot be read straight into their places."""
        return sum(align(part.nbytes) for piece in self.pieces if self.fits(piece) is None for part in piece.parts)

    def fits(self, piece: Piece) -> StoredTensor | None:
        """The stored tensor whose bytes are those of a piece's place; None if there is none."""
        stored = piece.stored
        return stored if isinstance(stored, StoredTensor) and stored.dtype == self.dtype and piece.contiguous else None

    def place(self, start: int) -> int:
        """The first place from `start` on where it can lie: that of torch's own memory, or of transformers' mapping."""
        mapped = self.fits(self.pieces[0]) if len(self.pieces) == 1 else None
        return align(start) if mapped is None else mapped.place(start)


def read(checkpoint: Checkpoint, wanted: Sequence[tuple[Plan, Tensor]], stage: Callable[[int], Bytes]) -> None:
    """Read parameters into contiguous tensors. `stage` gives memory for pieces that are copied from there.

    A quantised weight takes more memory while it is dequantised: itself in float32, and what its library uses.
    """
    size = sum(plan.staged_bytes for plan, _ in wanted)
    staging, used, reads, copies = stage(size) if size else None, 0, list[tuple[StoredTensor, Bytes]](), []
    for plan, tensor in wanted:
        for piece in plan.pieces:
            part = piece.of(tensor)
            if (stored := plan.fits(piece)) is not None:
                reads.append((stored, part.flatten().view(torch.uint8).numpy()))
                continue
            assert staging is not None
            raw = []
            for stored in piece.parts:
                into = staging[used : used + stored.nbytes]
                used += align(stored.nbytes)
                reads.append((stored, into))
                raw.append(torch.from_numpy(into).view(stored.dtype).view(stored.shape))
            copies.append((part, piece.stored, raw))
    checkpoint.read(reads)
    for part, made, raw in copies:
        part.copy_(made.decode(*raw) if isinstance(made, Packed) else raw[0])


def align(size: int) -> int:
    """The next multiple of torch's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def size_together(plans: Iterable[Plan]) -> int:
    """The memory that some parameters take together."""
    end = 0
    for plan in plans:
        end = plan.place(end) + plan.nbytes
    return end
