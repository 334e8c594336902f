"""The attention of an explicit layer: products with its values, frozen pattern and output matrix; no Q, no K.

For a block X of vectors at positions s, with H heads that share H_kv value heads:

    A(X)_t = C_post sum_h O_h sum_s P_h[t, s] V_h C_pre X_s

C_pre and C_post are the frozen factors of the norms before and behind, P_h the frozen probabilities of head h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.network.blocks import CausalBlock, LayerCoefficients, Probe, Workspace, add_or_write
from loclin.network.matrix import Matrix


class ExplicitAttention:
    """Products with one layer's attention."""

    def __init__(self, v: Matrix, o: Matrix, coefficients: LayerCoefficients, workspace: Workspace) -> None:
        self._v, self._o = v, o
        self.device = self._o.device
        self.biased = v.bias is not None or o.bias is not None
        self._before, self._behind = coefficients.attn_in, coefficients.attn_out
        self._pattern, self._workspace = coefficients.pattern, workspace
        self._heads = self._pattern.shape[0]
        self._d_head = self._o.shape[1] // self._heads
        self._kv = self._v.shape[0] // self._d_head

    def hold(self, queries: slice, passes: int) -> None:
        """Hold the attention pattern of some queries for so many passes, which are all for these queries."""
        self._pattern = self._pattern.held(queries, passes)

    def vjp(self, cotangents: Tensor, active: slice, reached: slice) -> Float[Tensor, "S n d"]:
        """Pull cotangents `[T, n, d]` at the active positions back to those reached, up to C_pre, which is left out."""
        G = cotangents.to(self.device)
        if self._behind is not None:
            G = torch.mul(G, self._behind[active, None], out=self._buffer("scaled", *G.shape))
        (length, n, d), heads, kv, d_head = G.shape, self._heads, self._kv, self._d_head
        # O^T: [T n, d] -> [T n, H d_head]
        by_position = self._o.pull(G.reshape(-1, d), self._buffer("by_position", length * n, heads * d_head))
        # [T, n, H_kv, H/H_kv, d_head] -> [H_kv, H/H_kv, T, n, d_head]
        by_head = self._buffer("by_head", kv, heads // kv, length, n, d_head)
        by_head.copy_(by_position.view(length, n, kv, -1, d_head).permute(2, 3, 0, 1, 4))
        # P^T, summed over the heads that share a value head: [H_kv, H/H_kv T, S]^T [H_kv, H/H_kv T, n d_head]
        span = reached.stop - reached.start
        mixed = self._buffer("mixed", kv, span, n * d_head)
        self._pattern.mix_back(by_head.view(kv, -1, length, n * d_head), active, reached, mixed)
        # [H_kv, S, n, d_head] -> [S, n, H_kv, d_head]
        values = self._buffer("values", span, n, kv, d_head)
        values.copy_(mixed.view(kv, -1, n, d_head).permute(1, 2, 0, 3))
        # V^T: [S n, H_kv d_head] -> [S n, d]
        pulled = self._buffer("pulled", span * n, d)
        return self._v.pull(values.view(-1, kv * d_head), pulled).view(-1, n, d)

    def jvp(self, block: Tensor, start: int, wanted: slice, affine: bool = False) -> Float[Tensor, "W n d"]:
        """Push a block `[S, n, d]` that begins at a position to the wanted ones; `affine` adds the biases."""
        X = block.to(self.device)
        (length, n, d), heads, kv, d_head = X.shape, self._heads, self._kv, self._d_head
        reaching = slice(start, start + length)
        if self._before is not None:
            X = torch.mul(X, self._before[reaching, None], out=self._buffer("scaled", *X.shape))
        # V: [S, n, d] -> [S, n, H_kv d_head] -> [H_kv, S, n, d_head]
        values = self._v.push(X, affine=affine)
        by_head = self._buffer("by_head", kv, length, n, d_head)
        by_head.copy_(values.view(length, n, kv, d_head).permute(2, 0, 1, 3))
        # P: [H_kv, H/H_kv W, S] [H_kv, S, n d_head] -> [H_kv, H/H_kv W, n d_head]
        rows = wanted.stop - wanted.start
        mixed = self._buffer("mixed", kv, heads // kv * rows, n * d_head)
        self._pattern.mix(by_head.view(kv, length, -1), wanted, reaching, mixed)
        # [H, W, n, d_head] -> [W, n, H, d_head]
        by_position = self._buffer("by_position", rows, n, heads, d_head)
        by_position.copy_(mixed.view(heads, rows, n, d_head).permute(1, 2, 0, 3))
        # O: [W n, H d_head] -> [W n, d]
        if affine:
            pushed = self._o.push(by_position.view(rows, n, -1), affine=True)
            return pushed if self._behind is None else pushed * self._behind[wanted, None]
        pushed = self._o.push(by_position.view(rows * n, -1), self._buffer("pushed", rows * n, d)).view(rows, n, d)
        return pushed if self._behind is None else pushed.mul_(self._behind[wanted, None])

    def folding_pays(self, blocks: Sequence[CausalBlock], wanted: slice) -> bool:
        """Whether folding the pattern into O (see `push_folded`) is cheaper, and not larger than the blocks."""
        probs = self._pattern.whole()
        if probs is None or self._o.is_split:  # a fold is no weight that bfloat16 holds
            return False
        spans = [t - start + 1 for start, _ in blocks for t in range(max(start, wanted.start), wanted.stop)]
        here = all(block.device == self.device for _, block in blocks)
        pays = len(blocks) > 1 and here and sum(spans) * self._kv <= 1.2 * len(spans) * self._heads
        return pays and not probs[:, wanted].triu(1 + wanted.start).any()  # asked last: a GPU is waited for

    def push_folded(self, blocks: Sequence[CausalBlock], wanted: slice, add: bool, probe: Probe | None) -> None:
        """Push blocks in place, with the pattern folded into O: F[t, s] = C_post sum_h P_h[t, s] O_h per value head.

        No head is then moved in memory, and products go straight to the residual stream. With m positions from s to t
        a product has m d_head H_kv inner dimensions instead of d_head H, so this is for short prompts.
        """
        d, width, first = self._o.shape[0], self._kv * self._d_head, blocks[0].start
        seen = range(first, wanted.stop)
        folded = self._fold(first, wanted)
        # V^T C_pre at each position: [S, d, H_kv d_head]
        V = self._v.whole.T
        if self._before is not None:
            V = V * self._before[first : wanted.stop, :, None]
        V = V.expand(len(seen), d, width)
        for index, (start, block) in enumerate(blocks):
            n, length = block.shape[1], len(block)
            values = self._buffer("values", n, length, width)
            for s in range(length):
                torch.mm(block[s], V[start + s - first], out=values[:, s])
            for t in range(max(wanted.start, start), wanted.stop):
                # sum over s <= t: [n, (t - start + 1) H_kv d_head] [(t - start + 1) H_kv d_head, d]
                inner = values.view(n, -1)[:, : (t - start + 1) * width]
                matrix = folded[t - wanted.start, start - first : t - first + 1].view(-1, d)
                stream = block[t - start]
                if probe is not None and t == probe.position:
                    pushed = torch.mm(inner, matrix, out=self._buffer("pushed", n, d))
                    probe.record(index, "attn_out", slice(None), pushed)
                    add_or_write(stream, pushed, add)
                elif add:
                    stream.addmm_(inner, matrix)
                else:
                    torch.mm(inner, matrix, out=stream)

    def _fold(self, first: int, wanted: slice) -> Float[Tensor, "W S hd d"]:
        """F[t, s]^T for the wanted positions t and all s from `first` on."""
        heads, kv, d_head, d = self._heads, self._kv, self._d_head, self._o.shape[0]
        # [d, H_kv, H/H_kv, d_head] -> [H_kv, H/H_kv, d_head d]
        outputs = self._o.whole.view(d, kv, -1, d_head).permute(1, 2, 3, 0).reshape(kv, heads // kv, d_head * d)
        probs = self._pattern.whole()
        assert probs is not None
        probs = probs[:, wanted, first : wanted.stop]
        rows, length = probs.shape[1:]
        probs = probs.reshape(kv, -1, rows * length)
        folded = self._buffer("mixing", rows * length, kv, d_head * d)
        for group in range(kv):  # sum over h: [W S, H/H_kv] [H/H_kv, d_head d]
            torch.mm(probs[group].T, outputs[group], out=folded[:, group])
        folded = folded.view(rows, length, kv * d_head, d)
        return folded if self._behind is None else folded.mul_(self._behind[wanted, None, None])

    def _buffer(self, name: str, *shape: int) -> Tensor:
        return self._workspace(name, self._o.empty, *shape)
