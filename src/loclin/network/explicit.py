"""Explicit products: a layer's jvp and vjp from its weights and held coefficients, without autograd.

A position-wise MLP at position t is one matrix M_t = I + C_out W_down A_t W_up C_in (C: norms, A_t: held activations).
Pushing n columns through its factors costs 4 n d f flops; forming M_t once costs 2 d^2 f and applying it 2 n d^2. From
about n = 0.6 d on forming is cheaper, and there is nothing element-wise left to do. Attention skips Q and K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.freeze.quantised import dense_weight, has_dense_weight
from loclin.network.anatomy import Weights
from loclin.network.blocks import Started, Tap, Workspace, add_scaled, adjoining, deliver, groups
from loclin.network.coefficients import Coefficients

_FORMED_NUMBERS = 5_000_000
"""Numbers of the matrices that are formed at once: they stay in the processor's cache."""
_FORMED_NUMBERS_ACCELERATOR = 2**28
_ROWS = 4096
"""Rows that go through an MLP's factors at a time."""
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far an explicit layer's value may be from the frozen layer's own."""


def available(layer: nn.Module, weights: Weights, dtype: torch.dtype) -> bool:
    """Whether a layer has every part that its family's entry names, with a weight that can be read."""
    modules = dict(layer.named_modules())
    if dtype not in AGREEMENT or any(path not in modules for path in weights.paths):
        return False
    return all(has_dense_weight(modules[path]) for path in weights.matrices)


class ExplicitLayer:
    """One layer's explicit products.

    Blocks are `[T, n, d]`: what belongs to one position is one matrix. Memory: the weights once more where they are
    stored in another dtype, and what the workspace holds.

    Parameters
    ----------
    layer, weights
        The layer, and where its parts are.
    held
        Its coefficients.
    dtype
        Of the products.
    workspace
        Shared by all layers of a sweep.
    """

    def __init__(
        self, layer: nn.Module, weights: Weights, held: Coefficients, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._held, self._workspace = held, workspace
        self._v, self._v_bias = _part(layer, weights.v, dtype)
        self._o, self._o_bias = _part(layer, weights.o, dtype)
        self._gate, self._gate_bias = _part(layer, weights.gate, dtype)
        self._up, self._up_bias = _part(layer, weights.up, dtype)
        self._down, self._down_bias = _part(layer, weights.down, dtype)
        if weights.fused:
            rows = (len(self._v) - self._o.shape[1]) // 2  # q, k and v lie one behind the other, k as wide as v
            self._v, self._v_bias = self._v[-rows:], None if self._v_bias is None else self._v_bias[-rows:]
            inner = self._down.shape[1]
            self._gate, self._up = self._gate[:inner], self._up[inner:]
            if self._up_bias is not None and self._gate_bias is not None:
                self._gate_bias, self._up_bias = self._gate_bias[:inner], self._up_bias[inner:]

    @property
    def device(self) -> torch.device:
        """Where the products are done."""
        return self._down.device

    @property
    def biased(self) -> bool:
        """Whether any of its parts adds a bias."""
        biases = (self._v_bias, self._o_bias, self._gate_bias, self._up_bias, self._down_bias)
        return any(bias is not None for bias in biases)

    def formed(self, columns: int) -> bool:
        """Whether this many columns make forming the MLP's matrices cheaper than its factors."""
        d, f = self._down.shape
        return columns * (2 * f - d) > d * f

    def vjp(
        self,
        block: Float[Tensor, "T n d"],
        active: slice,
        reached: slice,
        chunk: int | None = None,
        below: str = "resid_pre",
        above: str = "resid_post",
    ) -> None:
        """Pull a block of cotangents from one of the layer's points back to another, in place.

        Parameters
        ----------
        block
            The cotangents; those outside `active` are zero.
        active, reached
            The positions that have cotangents, and those that they attend to.
        chunk
            How many columns at a time.
        below, above
            The points: `resid_pre` or `resid_mid`, and any of the layer's behind it.

        Notes
        -----
        Cost: 2 T d^2 (f + n) flops for the MLP with its matrices formed, 4 n T d f with its factors; 2 n T d d_head
        (H + H_kv) for V and O, 2 n T^2 H d_head for mixing.
        """
        if above in ("mlp_out", "resid_post"):
            self._mlp([Started(0, block)], active, back=True, onto=above == "resid_post")
        for part in block.split(chunk or block.shape[1], dim=1) if below == "resid_pre" else ():
            pulled = self._attention_back(part[active], active, reached)
            if above == "attn_out":
                part[active] = 0
            add_scaled(part[reached], pulled, _rows(self._held.attn_in, reached))

    def jvp(
        self,
        blocks: Sequence[Started],
        wanted: slice,
        chunk: int | None = None,
        below: str = "resid_pre",
        above: str = "resid_post",
        tap: Tap | None = None,
    ) -> None:
        """Push blocks of tangents from one of the layer's points to another, in place.

        Only the `wanted` positions are right afterwards, and those behind the last of them must not matter. Where the
        MLP's matrices are formed they serve all blocks.

        Parameters
        ----------
        blocks
            The tangents, each from the first position on that is not zero.
        wanted, chunk, below, above
            As for `vjp`.
        tap
            Shown what attention and MLP give at a wanted position.

        Notes
        -----
        Cost: as for `vjp`, V at all positions and the rest at those wanted.
        """
        folded = below == "resid_pre" and self._folds(blocks, wanted)
        if folded:
            self._attention_folded(blocks, wanted, above != "attn_out", tap)
        for index, (start, block) in enumerate(blocks if below == "resid_pre" and not folded else ()):
            rows = slice(max(wanted.start, start), wanted.stop)
            done = 0
            for part in block.split(chunk or block.shape[1], dim=1):
                pushed = self._attention_forth(part, start, rows)
                if self._held.attn_out is not None:
                    pushed.mul_(self._held.attn_out[rows, None])
                if tap is not None and rows.start <= tap.position < rows.stop:
                    tap.see(index, "attn_out", slice(done, done + part.shape[1]), pushed[tap.position - rows.start])
                deliver(part[rows.start - start : rows.stop - start], pushed, onto=above != "attn_out")
                done += part.shape[1]
        if above in ("mlp_out", "resid_post"):
            self._mlp(blocks, wanted, back=False, onto=above == "resid_post", tap=tap)

    def affine(self, x: Float[Tensor, "T d"]) -> tuple[Float[Tensor, "T d"], Float[Tensor, "T d"]]:
        """What attention and MLP add to an input, biases included. Cost: one column."""
        block, everywhere = x.to(self.device)[:, None], slice(0, len(x))
        attended = self._attention_forth(block, 0, everywhere, affine=True)
        if self._held.attn_out is not None:
            attended = attended * self._held.attn_out[:, None]
        moved = self._factored(block + attended, everywhere, back=False, affine=True)
        return attended[:, 0], moved[:, 0]

    def value(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """The layer's value at an input, biases included. Cost: one column."""
        attended, moved = self.affine(x)
        return x.to(self.device) + attended + moved

    def _room(self, name: str, *shape: int) -> Tensor:
        return self._workspace(name, self._down, *shape)

    def _mlp(self, blocks: Sequence[Started], positions: slice, back: bool, onto: bool, tap: Tap | None = None) -> None:
        """Put blocks through the MLP, some positions at a time; `onto` the residual stream, or in its place."""
        columns = sum(block.shape[1] for _, block in blocks)
        formed = self.formed(columns)
        for group in groups(positions, self._together if formed else max(1, _ROWS // columns)):
            maps = self._maps(group) if formed else None
            if maps is not None and not back and self._applied_together(maps, blocks, group, onto, tap):
                continue
            for index, (start, block) in enumerate(blocks):
                own = slice(max(group.start, start), group.stop)
                if own.start >= own.stop:
                    continue
                source = block[own.start - start : own.stop - start]
                if maps is None:
                    moved = self._factored(source, own, back)
                else:
                    some = maps[own.start - group.start :]
                    room = self._room("moved", *source.shape)
                    moved = torch.bmm(source.to(self.device), some if back else some.mT, out=room)
                if tap is not None and own.start <= tap.position < own.stop:
                    tap.see(index, "mlp_out", slice(None), moved[tap.position - own.start])
                deliver(source, moved, onto)

    def _applied_together(
        self, maps: Tensor, blocks: Sequence[Started], group: slice, onto: bool, tap: Tap | None
    ) -> bool:
        """Push all blocks through each position's matrix in one product, which is faster, if their memory allows it."""
        reached = [[i for i, (start, _) in enumerate(blocks) if start <= t] for t in range(group.start, group.stop)]
        joined = [
            adjoining([blocks[i].block[t - blocks[i].start] for i in some]) if some else None
            for t, some in enumerate(reached, group.start)
        ]
        if any(source is None or source.device != self.device for source in joined):
            return False
        for t, some, source, matrix in zip(range(group.start, group.stop), reached, joined, maps, strict=True):
            assert source is not None
            moved = torch.mm(source, matrix.T, out=self._room("moved", *source.shape))
            if tap is not None and t == tap.position:
                for i, part in zip(some, moved.chunk(len(some)), strict=True):
                    tap.see(i, "mlp_out", slice(None), part)
            deliver(source, moved, onto)
        return True

    @property
    def _together(self) -> int:
        """How many positions' matrices are formed at once."""
        d, f = self._down.shape
        numbers = _FORMED_NUMBERS if self.device.type == "cpu" else _FORMED_NUMBERS_ACCELERATOR
        return max(1, numbers // (d * (d + f)) // 2 * 2)  # an odd one would leave a core idle

    def _maps(self, group: slice) -> Float[Tensor, "g d d"]:
        """C_out W_down A_t W_up C_in for a group of positions.

        Without the identity, which is added behind the product: that rounds less.
        """
        held = self._held
        d, f = self._down.shape
        g = group.stop - group.start
        maps = self._room("maps", g * d, d)
        for i, (factors, weight) in enumerate(self._branches()):
            inner = torch.mul(factors[group, None], self._down, out=self._room("inner", g, d, f)).view(g * d, f)
            if i:
                maps.addmm_(inner, weight)
            else:
                torch.mm(inner, weight, out=maps)
        maps = maps.view(g, d, d)
        if held.mlp_in is not None:
            maps.mul_(held.mlp_in[group, None])
        return maps if held.mlp_out is None else maps.mul_(held.mlp_out[group, :, None])

    def _branches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(held factors, weight) of the branches through which something flows."""
        for factors, weight in ((self._held.up, self._up), (self._held.gate, self._gate)):
            if factors is not None:
                yield factors, weight

    def _factored(self, source: Tensor, group: slice, back: bool, affine: bool = False) -> Tensor:
        """What a group of positions becomes in the MLP's factors."""
        held = self._held
        source = source.to(self.device)
        before, after = (held.mlp_out, held.mlp_in) if back else (held.mlp_in, held.mlp_out)
        if before is not None:
            source = source * before[group, None]
        if back:
            inner = source @ self._down
            moved = torch.zeros_like(source)
            for factors, weight in self._branches():
                moved += (inner * factors[group, None]) @ weight
        else:
            biases = {id(self._up): self._up_bias, id(self._gate): self._gate_bias} if affine else {}
            live = [
                nn.functional.linear(source, weight, biases.get(id(weight))).mul_(factors[group, None])
                for factors, weight in self._branches()
            ]
            inner = live[0] if len(live) == 1 else live[0] + live[1]
            moved = nn.functional.linear(inner, self._down, self._down_bias if affine else None)
        return moved if after is None else moved.mul_(after[group, None])

    def _heads(self) -> tuple[int, int, int]:
        """How many heads, how many of keys and values, and d_head."""
        heads = self._held.probs.shape[0]
        d_head = self._o.shape[1] // heads
        return heads, self._v.shape[0] // d_head, d_head

    def _attention_back(self, cotangents: Tensor, active: slice, reached: slice) -> Float[Tensor, "S n d"]:
        """Pull through O, the mixing and V; the norm before V is left to the caller."""
        held, G = self._held, cotangents.to(self.device)
        if held.attn_out is not None:
            G = torch.mul(G, held.attn_out[active, None], out=self._room("scaled", *G.shape))
        (length, n, d), (heads, kv, d_head) = G.shape, self._heads()
        by_position = torch.mm(G.reshape(-1, d), self._o, out=self._room("by_position", length * n, heads * d_head))
        by_head = self._room("by_head", kv, heads // kv, length, n, d_head)
        by_head.copy_(by_position.view(length, n, kv, -1, d_head).permute(2, 3, 0, 1, 4))
        probs = held.probs[:, active, reached].reshape(kv, -1, reached.stop - reached.start)
        mixed = self._room("mixed", kv, probs.shape[-1], n * d_head)
        torch.bmm(probs.transpose(1, 2), by_head.view(kv, -1, n * d_head), out=mixed)
        values = self._room("values", probs.shape[-1], n, kv, d_head)
        values.copy_(mixed.view(kv, -1, n, d_head).permute(1, 2, 0, 3))
        pulled = self._room("pulled", probs.shape[-1] * n, d)
        return torch.mm(values.view(-1, kv * d_head), self._v, out=pulled).view(-1, n, d)

    def _attention_forth(
        self, block: Tensor, start: int, wanted: slice, affine: bool = False
    ) -> Float[Tensor, "W n d"]:
        """Push a block that begins at a position through V, the mixing and O; the norm behind O is the caller's."""
        held, X = self._held, block.to(self.device)
        (length, n, d), (heads, kv, d_head) = X.shape, self._heads()
        reaching = slice(start, start + length)
        if held.attn_in is not None:
            X = torch.mul(X, held.attn_in[reaching, None], out=self._room("scaled", *X.shape))
        values = nn.functional.linear(X, self._v, self._v_bias if affine else None)
        by_head = self._room("by_head", kv, length, n, d_head)
        by_head.copy_(values.view(length, n, kv, d_head).permute(2, 0, 1, 3))
        probs = held.probs[:, wanted, reaching]
        rows = probs.shape[1]
        mixed = self._room("mixed", kv, heads // kv * rows, n * d_head)
        torch.bmm(probs.reshape(kv, -1, length), by_head.view(kv, length, -1), out=mixed)
        by_position = self._room("by_position", rows, n, heads, d_head)
        by_position.copy_(mixed.view(heads, rows, n, d_head).permute(1, 2, 0, 3))
        if affine:
            return nn.functional.linear(by_position.view(rows, n, -1), self._o, self._o_bias)
        pushed = self._room("pushed", rows * n, d)
        return torch.mm(by_position.view(rows * n, -1), self._o.T, out=pushed).view(rows, n, d)

    def _folds(self, blocks: Sequence[Started], wanted: slice) -> bool:
        """Whether it is cheaper, and not larger than the blocks, to mix heads in O's matrix for each two positions."""
        heads, kv, d_head = self._heads()
        spans = [t - start + 1 for start, _ in blocks for t in range(max(start, wanted.start), wanted.stop)]
        causal = not self._held.probs[:, wanted].triu(1 + wanted.start).any()
        here = all(block.device == self.device for _, block in blocks)
        return len(blocks) > 1 and causal and here and sum(spans) * kv <= 1.2 * len(spans) * heads

    def _attention_folded(self, blocks: Sequence[Started], wanted: slice, onto: bool, tap: Tap | None) -> None:
        """Push blocks through the attention, in place, with the pattern in O: for each kv head sum_h P_h[t, s] O_h.

        No head is then moved in memory, and products go straight to the residual stream. With m positions from s to t
        a product has m d_head H_kv inner dimensions instead of d_head H, so this is for short prompts.
        """
        held, (heads, kv, d_head) = self._held, self._heads()
        d, width, first = len(self._o), kv * d_head, blocks[0].start
        seen = range(first, wanted.stop)
        V = self._v.T if held.attn_in is None else self._v.T * held.attn_in[first : wanted.stop, :, None]
        V = V.expand(len(seen), d, width)
        outputs = self._o.view(d, kv, -1, d_head).permute(1, 2, 3, 0).reshape(kv, heads // kv, d_head * d)
        probs = held.probs[:, wanted, first : wanted.stop]
        rows = probs.shape[1]
        probs = probs.reshape(kv, -1, rows * len(seen))
        mixing = self._room("mixing", rows * len(seen), kv, d_head * d)
        for group in range(kv):
            torch.mm(probs[group].T, outputs[group], out=mixing[:, group])
        mixing = mixing.view(rows, len(seen), width, d)
        if held.attn_out is not None:
            mixing.mul_(held.attn_out[wanted, None, None])
        for index, (start, block) in enumerate(blocks):
            n, length = block.shape[1], len(block)
            values = self._room("values", n, length, width)
            for s in range(length):
                torch.mm(block[s], V[start + s - first], out=values[:, s])
            for t in range(max(wanted.start, start), wanted.stop):
                inner = values.view(n, -1)[:, : (t - start + 1) * width]
                matrix = mixing[t - wanted.start, start - first : t - first + 1].view(-1, d)
                stream = block[t - start]
                if tap is not None and t == tap.position:
                    pushed = torch.mm(inner, matrix, out=self._room("pushed", n, d))
                    tap.see(index, "attn_out", slice(None), pushed)
                    deliver(stream, pushed, onto)
                elif onto:
                    stream.addmm_(inner, matrix)
                else:
                    torch.mm(inner, matrix, out=stream)


def _part(layer: nn.Module, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A part's weight `[out, in]` and bias."""
    module = layer.get_submodule(path)
    weight, bias = dense_weight(module), module.bias
    assert weight is not None
    return weight.to(dtype), bias.detach().to(dtype) if isinstance(bias, Tensor) else None


def _rows(factors: Tensor | None, positions: slice) -> Tensor | None:
    return None if factors is None else factors[positions, None]
