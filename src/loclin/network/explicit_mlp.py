"""The MLP of an explicit layer: one matrix for each position, applied through its factors or formed.

With frozen factors a of the up and the gate branch `[T, f]`, and C_pre, C_post of the norms before and behind, the MLP
at position t is the matrix

    M_t = C_post W_down (diag(a_up[t]) W_up + diag(a_gate[t]) W_gate) C_pre

Pushing n columns through its factors costs 4 n d f flops; forming M_t once costs 2 d^2 f and applying it 2 n d^2. From
about n = 0.6 d on forming is cheaper, and there is nothing element-wise left to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.network.blocks import (
    CausalBlock,
    LayerCoefficients,
    Probe,
    Workspace,
    add_or_write,
    contiguous_view,
)
from loclin.network.matrix import Matrix
from loclin.network.split import multiply_both

_FORMED_NUMBERS = 5_000_000  # numbers of the matrices that are formed at once: they stay in the processor's cache
_FORMED_NUMBERS_ACCELERATOR = 2**28
_ROWS = 2048  # rows that go through the factors at a time


class ExplicitMLP:
    """Products with one layer's MLP."""

    def __init__(
        self,
        up: Matrix | None,
        gate: Matrix | None,
        down: Matrix,
        coefficients: LayerCoefficients,
        workspace: Workspace,
        split_formed: bool = False,
    ) -> None:
        self._down, self.device, self._split_formed = down, down.device, split_formed
        self._before, self._behind = coefficients.mlp_in, coefficients.mlp_out
        self._branches = [
            (factors, matrix)
            for factors, matrix in ((coefficients.up, up), (coefficients.gate, gate))
            if factors is not None and matrix is not None
        ]
        """(a `[T, f]`, W `[f, d]`) of the branches through which something flows."""
        self.biased = any(matrix.bias is not None for matrix in (down, *(matrix for _, matrix in self._branches)))
        self._workspace = workspace

    def forms_matrices(self, columns: int) -> bool:
        """Whether forming the positions' matrices is cheaper than their factors, for so many columns."""
        d, f = self._down.shape
        return columns * (2 * f - d) > d * f

    def vjp(self, block: Float[Tensor, "T n d"], group: slice, add: bool) -> None:
        """Pull a block back through the MLP at a group of positions, in place: added with `add`, or instead."""
        source = block[group]
        if self.forms_matrices(block.shape[1]):
            moved = self._apply(source.to(self.device), self._form(group))
        else:
            moved = self._pull_through_factors(source, group)
        add_or_write(source, moved, add)

    def jvp(self, blocks: Sequence[CausalBlock], group: slice, add: bool, probe: Probe | None) -> None:
        """Push blocks through the MLP at a group of positions, in place; formed matrices serve all blocks."""
        formed = self.forms_matrices(sum(block.shape[1] for _, block in blocks))
        matrices = self._form(group) if formed else None
        if matrices is not None and self._push_all_at_once(matrices, blocks, group, add, probe):
            return
        for index, (start, block) in enumerate(blocks):
            own = slice(max(group.start, start), group.stop)
            if own.start >= own.stop:
                continue
            source = block[own.start - start : own.stop - start]
            if matrices is None:
                moved = self.push_through_factors(source, own)
            else:
                moved = self._apply(source.to(self.device), matrices[own.start - group.start :].mT)
            if probe is not None and own.start <= probe.position < own.stop:
                probe.record(index, "mlp_out", slice(None), moved[probe.position - own.start])
            add_or_write(source, moved, add)

    def push_through_factors(self, source: Tensor, group: slice, affine: bool = False) -> Float[Tensor, "g n d"]:
        """Push `[g, n, d]` at a group of positions through the factors; with `affine` biases are added."""
        source = source.to(self.device)
        (g, n, d), f = source.shape, self._down.shape[1]
        if self._before is not None:
            source = torch.mul(source, self._before[group, None], out=self._buffer("scaled", g, n, d))
        inner = None
        rows = source if affine else source.reshape(-1, d)
        for factors, matrix in self._branches:
            out = None if affine else self._buffer("inner" if inner is None else "branch", g * n, f)
            live = matrix.push(rows, out, affine).view(g, n, f).mul_(factors[group, None])
            inner = live if inner is None else inner.add_(live)
        assert inner is not None
        if affine:
            moved = self._down.push(inner, affine=True)
        else:
            moved = self._down.push(inner.view(-1, f), self._buffer("moved", g * n, d)).view(g, n, d)
        return moved if self._behind is None else moved.mul_(self._behind[group, None])

    def _pull_through_factors(self, source: Tensor, group: slice) -> Float[Tensor, "g n d"]:
        source = source.to(self.device)
        (g, n, d), f = source.shape, self._down.shape[1]
        if self._behind is not None:
            source = torch.mul(source, self._behind[group, None], out=self._buffer("scaled", g, n, d))
        # W_down^T: [g n, d] -> [g n, f]
        inner = self._down.pull(source.reshape(-1, d), self._buffer("inner", g * n, f)).view(g, n, f)
        moved = self._buffer("moved", g * n, d)
        for i, (factors, matrix) in enumerate(self._branches):
            is_last = i == len(self._branches) - 1
            branch = inner if is_last else self._buffer("branch", g, n, f)
            torch.mul(inner, factors[group, None], out=branch)
            matrix.pull_into(branch.view(-1, f), moved, add=i > 0)
        moved = moved.view(g, n, d)
        return moved if self._before is None else moved.mul_(self._before[group, None])

    def _push_all_at_once(
        self, matrices: Tensor, blocks: Sequence[CausalBlock], group: slice, add: bool, probe: Probe | None
    ) -> bool:
        """Push all blocks through each position's matrix in one product, which is faster, if their memory allows it."""
        reached = [[i for i, (start, _) in enumerate(blocks) if start <= t] for t in range(group.start, group.stop)]
        joined = [
            contiguous_view([blocks[i].block[t - blocks[i].start] for i in some]) if some else None
            for t, some in enumerate(reached, group.start)
        ]
        if any(source is None for source in joined):
            return False
        for t, some, source, matrix in zip(range(group.start, group.stop), reached, joined, matrices, strict=True):
            assert source is not None
            moved = self._apply(source.to(self.device), matrix.T)
            if probe is not None and t == probe.position:
                for i, part in zip(some, moved.chunk(len(some)), strict=True):
                    probe.record(i, "mlp_out", slice(None), part)
            add_or_write(source, moved, add)
        return True

    def groups(self, positions: slice, columns: int) -> list[slice]:
        """The positions that are done at a time."""
        size = _ROWS // columns
        if self.forms_matrices(columns):
            d, f = self._down.shape
            numbers = _FORMED_NUMBERS if self.device.type == "cpu" else _FORMED_NUMBERS_ACCELERATOR
            own = d * (d + f + (3 * d if self._split_formed else 0))
            size = numbers // own // 2 * 2  # odd would leave a core idle
        starts = range(positions.start, positions.stop, max(1, size))
        return [slice(t, min(t + starts.step, positions.stop)) for t in starts]

    def _apply(self, source: Float[Tensor, "*g n d"], formed: Float[Tensor, "*g d d"]) -> Float[Tensor, "*g n d"]:
        """Blocks times formed matrices."""
        out = self._buffer("moved", *source.shape)
        if self._split_formed:
            return multiply_both(source, formed, self._workspace, out)
        return torch.mm(source, formed, out=out) if source.dim() == 2 else torch.bmm(source, formed, out=out)

    def _form(self, group: slice) -> Float[Tensor, "g d d"]:
        """M_t for a group of positions; the identity of the residual stream is added behind it, which rounds less."""
        d, f = self._down.shape
        g = group.stop - group.start
        matrices = self._buffer("maps", g * d, d)
        for i, (factors, matrix) in enumerate(self._branches):
            # (W_down diag(a)) W: [g d, f] [f, d]
            inner = torch.mul(factors[group, None], self._down.whole, out=self._buffer("inner", g, d, f)).view(g * d, f)
            matrix.pull_into(inner, matrices, add=i > 0)
        matrices = matrices.view(g, d, d)
        if self._before is not None:
            matrices.mul_(self._before[group, None])
        return matrices if self._behind is None else matrices.mul_(self._behind[group, :, None])

    def _buffer(self, name: str, *shape: int) -> Tensor:
        return self._workspace(name, self._down.empty, *shape)
