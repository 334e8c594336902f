"""A layer's frozen attention pattern P = softmax(Q K^T), `[H, T, S]` for T queries and S keys: whole, or in blocks.

A long prompt's P is larger than all else that a layer needs. Then Q and K are held in its place, and each product makes
P again, some queries at a time; keys that none of these queries may attend to are left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loclin.common.brief import brief

BLOCK_BYTES = 2**22
"""Of P that are made at a time on a CPU: they stay in its cache."""
_BLOCK_BYTES_ACCELERATOR = 2**28
_HELD = 8
"""How often the bytes that a pattern may have in an analysis with graphs, which have it eleven times."""
_MASK_ROWS = 256  # of a mask that are looked at together


class PatternBlock(NamedTuple):
    """Some queries' probabilities `[H, R, K]` for the keys that they may attend to; those of other keys are zero."""

    rows: slice
    keys: slice
    probs: Tensor


class Pattern(ABC):
    """The attention probabilities of one layer, one matrix for each query head.

    Products are with `[n_kv, S, m]`, where each of n_kv value heads serves H / n_kv query heads, one behind the other.
    """

    shape: tuple[int, int, int]
    """(H, T, S)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes that are held."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Pattern:
        """The same pattern, with blocks and products in another dtype."""

    @abstractmethod
    def on(self, device: torch.device) -> Pattern:
        """The same pattern on another device."""

    @abstractmethod
    def whole(self) -> Tensor | None:
        """All probabilities `[H, T, S]`, where they are held."""

    @abstractmethod
    def blocks(self, queries: slice) -> Iterator[PatternBlock]:
        """The probabilities of some queries, in blocks; every query is in one of them."""

    def looks_ahead(self) -> bool | None:
        """Whether a query may attend to a later key; None where only the probabilities say."""
        return None

    def held(self, queries: slice, passes: int) -> Pattern:  # noqa: ARG002 (what is whole is held)
        """The same for some queries alone, made once for so many passes where it would be made again for each."""
        return self

    def unwatched(self) -> Pattern:
        """The same pattern, whose blocks are shown to nobody."""
        return self

    def everything(self) -> Iterator[PatternBlock]:
        """The blocks of all queries."""
        return self.blocks(slice(0, self.shape[1]))

    def row(self, head: int, query: int) -> Tensor:
        """One query's probabilities `[S]` in one head."""
        ((_, keys, probs),) = self.blocks(slice(query, query + 1))
        found = probs.new_zeros(self.shape[2])
        found[keys] = probs[head, 0]
        return found

    def mix(self, values: Tensor, queries: slice, keys: slice, out: Tensor) -> Tensor:
        """P V for some queries: values `[n_kv, K, m]` of some keys become `out` `[n_kv, H/n_kv R, m]`."""
        by_query = out.view(len(values), -1, queries.stop - queries.start, out.shape[-1])
        for rows, seen, probs in self.blocks(queries):
            probs, common = _cut(probs, seen, keys, len(values))
            from_keys = values[:, _shift(common, keys)]
            if probs.shape[1] == out.shape[1]:
                return torch.bmm(probs, from_keys, out=out)
            mixed = torch.bmm(probs, from_keys)
            by_query[:, :, _shift(rows, queries)] = mixed.view(len(values), by_query.shape[1], -1, out.shape[-1])
        return out

    def mix_back(self, given: Tensor, queries: slice, keys: slice, out: Tensor) -> Tensor:
        """P^T G for some queries: `[n_kv, H/n_kv, R, m]` become `out` `[n_kv, K, m]`, sums of a value head's heads."""
        started = False
        for rows, seen, probs in self.blocks(queries):
            probs, common = _cut(probs, seen, keys, len(out))
            from_rows = given[:, :, _shift(rows, queries)].reshape(len(out), -1, out.shape[-1])
            if (rows, common) == (queries, keys):
                return torch.bmm(probs.mT, from_rows, out=out)
            if not started:
                out.zero_()
            started = True
            out[:, _shift(common, keys)].baddbmm_(probs.mT, from_rows)
        return out

    __repr__ = brief


@dataclass(frozen=True, eq=False, repr=False)
class WholePattern(Pattern):
    """A pattern that is held whole, `[H, T, S]`."""

    probs: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(H, T, S)."""
        heads, queries, keys = self.probs.shape
        return heads, queries, keys

    @property
    def nbytes(self) -> int:
        """The bytes of P."""
        return self.probs.nbytes

    def to(self, dtype: torch.dtype) -> WholePattern:
        """The same probabilities in another dtype."""
        return WholePattern(self.probs.to(dtype))

    def on(self, device: torch.device) -> WholePattern:
        """The same probabilities on another device."""
        return WholePattern(self.probs.to(device))

    def whole(self) -> Tensor:
        """P."""
        return self.probs

    def blocks(self, queries: slice) -> Iterator[PatternBlock]:
        """One block."""
        yield PatternBlock(queries, slice(0, self.probs.shape[2]), self.probs[:, queries])


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern(Pattern):
    """A pattern that is made again from its queries and keys, in blocks of at most `most` bytes, or one query.

    Scores are computed in `dtype`, that of the linear path: a narrower one would round P differently in each block.
    """

    query: Tensor  # [1, H, T, d_head]
    key: Tensor  # [1, H_k, S, d_head]
    mask: Tensor | None  # as for `F.scaled_dot_product_attention`; shared by layers, and not counted in `nbytes`
    is_causal: bool
    scale: float | None
    dtype: torch.dtype
    most: int
    see: Callable[[PatternBlock], None] | None = None  # shown every block that is made

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(H, T, S)."""
        return self.query.shape[1], self.query.shape[2], self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """The bytes of Q and K."""
        return self.query.nbytes + self.key.nbytes

    def to(self, dtype: torch.dtype) -> BlockPattern:
        """The same pattern, computed in another dtype."""
        return replace(self, dtype=dtype)

    def on(self, device: torch.device) -> BlockPattern:
        """The same queries and keys on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, query=self.query.to(device), key=self.key.to(device), mask=mask)

    def looks_ahead(self) -> bool | None:
        """Whether the mask, if it is not one of numbers, lets a query attend to a later key."""
        if self.is_causal or self.mask is None:
            return not self.is_causal
        if self.mask.dtype != torch.bool:
            return None
        every = self.mask.expand(*self.mask.shape[:-2], *self.shape[1:])
        return any(bool(rows.triu(1 + i * _MASK_ROWS).any()) for i, rows in enumerate(every.split(_MASK_ROWS, dim=-2)))

    def held(self, queries: slice, passes: int) -> Pattern:
        """The blocks of these queries, where all would take less than a graph may have of the same pattern."""
        heads, length, keys = self.shape
        if passes < 2 or heads * length * keys * self.dtype.itemsize > _HELD * self.most:
            return self
        return HeldPattern(self.shape, list(self.blocks(queries)))

    def unwatched(self) -> BlockPattern:
        """The same pattern, without `see`."""
        return replace(self, see=None)

    def whole(self) -> None:
        """It is not held."""
        return

    def blocks(self, queries: slice) -> Iterator[PatternBlock]:
        """Blocks of queries, with the keys between the first and the last that any of them may attend to."""
        key = self.key.to(self.dtype)
        for start in range(queries.start, queries.stop, self._rows()):
            rows = slice(start, min(start + self._rows(), queries.stop))
            block = self._block(rows, key)
            if self.see is not None:
                self.see(block)
            yield block

    def _block(self, rows: slice, key: Tensor) -> PatternBlock:
        """The probabilities of a block of queries, as `probabilities` computes them, in place."""
        keys, mask = self._allowed(rows)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        query = self.query[:, :, rows].to(self.dtype) * scale
        scores = (grouped(query, key.shape[1]) @ key[:, :, keys].mT).view(*query.shape[:-1], keys.stop - keys.start)
        if self.is_causal:
            own = scores[..., min(rows.start, keys.stop) :]
            own.masked_fill_(torch.ones_like(own[0, 0], dtype=torch.bool).triu(1), -math.inf)
        if mask is not None:
            mask = by_head(mask, self.query, key)
            scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
        probs = torch.softmax(scores, dim=-1)[0]
        return PatternBlock(rows, keys, probs if mask is None else probs.nan_to_num_(0.0))

    def _rows(self) -> int:
        """How many queries go into a block."""
        heads, _, keys = self.shape
        most = BLOCK_BYTES if self.query.device.type == "cpu" else _BLOCK_BYTES_ACCELERATOR
        return max(1, min(self.most, most) // (heads * keys * self.dtype.itemsize))

    def _allowed(self, rows: slice) -> tuple[slice, Tensor | None]:
        """The keys for some queries, and the mask between the two, where one is given."""
        n_keys = self.shape[2]
        if self.is_causal:
            return slice(0, min(rows.stop, n_keys)), None
        if self.mask is None:
            return slice(0, n_keys), None
        one_row = self.mask.dim() < 2 or self.mask.shape[-2] == 1  # the same keys for every query
        mask = self.mask if one_row else self.mask[..., rows, :]
        if mask.shape[-1] == 1:
            return slice(0, n_keys), mask
        attended = mask if mask.dtype == torch.bool else mask != -math.inf
        found = attended.reshape(-1, n_keys).any(0).nonzero()
        keys = slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
        return keys, mask[..., keys]


@dataclass(frozen=True, eq=False, repr=False)
class HeldPattern(Pattern):
    """A pattern in blocks that are held, for several passes over one layer; in every bit as if each made them."""

    shape: tuple[int, int, int]
    held_blocks: list[PatternBlock]

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks."""
        return sum(block.probs.nbytes for block in self.held_blocks)

    def to(self, dtype: torch.dtype) -> HeldPattern:
        """The same probabilities in another dtype."""
        return replace(self, held_blocks=[block._replace(probs=block.probs.to(dtype)) for block in self.held_blocks])

    def on(self, device: torch.device) -> HeldPattern:
        """The same probabilities on another device."""
        return replace(self, held_blocks=[block._replace(probs=block.probs.to(device)) for block in self.held_blocks])

    def whole(self) -> None:
        """It is not in one piece."""
        return

    def blocks(self, queries: slice) -> Iterator[PatternBlock]:
        """The parts of the held blocks that have some of these queries."""
        for rows, keys, probs in self.held_blocks:
            common = slice(max(rows.start, queries.start), min(rows.stop, queries.stop))
            if common.start < common.stop:
                yield PatternBlock(common, keys, probs[:, _shift(common, rows)])


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The probabilities `[B, H, T_query, T_key]` of `F.scaled_dot_product_attention`.

    Cost: H * T_query * T_key * d_head multiplications and that many probabilities.
    """
    scores = grouped(query, key.shape[-3]) @ key.transpose(-2, -1)
    scores = scores.view(*query.shape[:-1], -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = by_head(mask, query, key)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probs = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return probs.nan_to_num(0.0)  # a query that may attend to nothing


def by_head(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask for each query head, where there is one for each key head."""
    groups = query.shape[-3] // key.shape[-3]
    per_key_head = mask.dim() > 2 and mask.shape[-3] == key.shape[-3] and groups > 1
    return mask.repeat_interleave(groups, dim=-3) if per_key_head else mask


def grouped(per_query_head: Tensor, n_kv_heads: int) -> Tensor:
    """`[..., H, T, n]` as `[..., H_kv, H/H_kv * T, n]`: grouped queries share a key head without a copy of it."""
    *batch, heads, length, width = per_query_head.shape
    return per_query_head.reshape(*batch, n_kv_heads, heads // n_kv_heads * length, width)


def _cut(probs: Tensor, seen: slice, keys: slice, n_kv: int) -> tuple[Tensor, slice]:
    """The probabilities of the keys that are both seen and asked for, by value head, and which keys these are."""
    start = max(seen.start, keys.start)
    common = slice(start, max(start, min(seen.stop, keys.stop)))
    part = probs[:, :, _shift(common, seen)]
    return grouped(part, n_kv), common


def _shift(part: slice, of: slice) -> slice:
    """A slice, counted from the start of another."""
    return slice(part.start - of.start, part.stop - of.start)


class _Mixing(torch.autograd.Function):
    """P V for V `[1, n_kv, S, n]`, or P^T G; each is the other's derivative. P is constant, and made when needed."""

    @staticmethod
    def forward(moved: Tensor, pattern: Pattern, n_kv: int, back: bool) -> Tensor:
        """By operations that autograd can batch: no views of everything, and nothing in place but sums."""
        (heads, length, n_keys), width = pattern.shape, moved.shape[-1]
        by_value_head = moved.reshape(n_kv, -1, length, width) if back else moved[0]
        summed, mixed = moved.new_zeros(n_kv, n_keys, width) if back else moved, []
        for rows, keys, probs in pattern.everything():
            some, n = grouped(probs, n_kv), rows.stop - rows.start
            if back:
                from_rows = by_value_head.narrow(2, rows.start, n).reshape(n_kv, -1, width)
                summed.narrow(1, keys.start, some.shape[-1]).add_(some.mT @ from_rows)
            else:
                from_keys = by_value_head.narrow(1, keys.start, some.shape[-1])
                mixed.append((some @ from_keys).reshape(n_kv, -1, n, width))
        return summed[None] if back else torch.cat(mixed, 2).reshape(1, heads, length, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.pattern, ctx.n_kv, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _mix(grads[0], ctx.pattern, ctx.n_kv, not ctx.back), None, None, None


def _mix(moved: Tensor, pattern: Pattern, n_kv: int, back: bool) -> Tensor:
    mixed: Tensor = _Mixing.apply(moved, pattern, n_kv, back)  # type: ignore[no-untyped-call]
    return mixed


def mix(pattern: Pattern, values: Tensor) -> Tensor:
    """P V `[1, H, T, n]` for values `[1, n_kv, S, n]`, with a graph."""
    return _mix(values, pattern, values.shape[-3], False)
