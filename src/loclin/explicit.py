"""Explicit links: a layer's backward products from its weights and held coefficients, without autograd.

A position-wise MLP at position t is one matrix M_t = I + C_out W_down A_t W_up C_in (C: norms, A_t: held activations).
Pushing n columns through its factors costs 4 n d f flops; forming M_t once costs 2 d^2 f and applying it 2 n d^2. From
about n = 0.6 d on forming is cheaper, and there is nothing element-wise left to do. Attention skips Q and K.

The coefficients are read off the generic link's own frozen graph, so every rule and gate split holds here too. A random
column goes along with every block, and is compared with the generic link's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.errors import NotExactError
from loclin.freeze import frozen
from loclin.freeze.quantised import dense_weight, has_dense_weight
from loclin.link import LayerLink, batched_vjp
from loclin.models.layout import Weights

_FORMED_NUMBERS = 2**24
"""Numbers of the matrices that are formed at once."""
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}


def worth_it(link: LayerLink, columns: int) -> bool:
    """Whether a layer has explicit products, and this many columns make forming its matrices cheaper."""
    weights = link.weights
    if weights is None or link.hold.ordinary or columns == 0 or link.trace.dtype not in _AGREEMENT:
        return False
    modules = dict(link.module.named_modules())
    if any(path not in modules for path in vars(weights).values() if path is not None):
        return False
    parts = [modules[path] for path in (weights.v, weights.o, weights.gate, weights.up, weights.down)]
    up = parts[3]
    if not all(has_dense_weight(part) for part in parts) or not isinstance(up, nn.Linear):
        return False
    f, d = up.out_features, up.in_features
    return columns * (2 * f - d) > d * f


@dataclass(frozen=True)
class _Coefficients:
    """What is held in one layer: norms `[T, d]`, the MLP's branches `[T, f]`, attention `[H, T, T]`."""

    attn_in: Tensor
    attn_out: Tensor | None
    mlp_in: Tensor
    mlp_out: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    probs: Tensor


class ExplicitLayer:
    """One layer's explicit backward products. Memory: its coefficients, and what the workspace holds."""

    def __init__(self, link: LayerLink, workspace: Workspace) -> None:
        weights = link.weights
        assert weights is not None
        self._workspace = workspace
        self._name = link.name
        self._v, self._o, self._gate, self._up, self._down = (
            cast("Tensor", dense_weight(link.module.get_submodule(path))).to(link.trace.dtype)
            for path in (weights.v, weights.o, weights.gate, weights.up, weights.down)
        )
        self._held, self._input, self._output = self._read(link, weights)

    def _read(self, link: LayerLink, weights: Weights) -> tuple[_Coefficients, Tensor, Tensor]:
        """Run the layer frozen and read every coefficient off its graph; also the graph's two ends."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def remember(path: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen[path] = (mode.live(args[0]), mode.live(output))

            return hook

        dtype = link.trace.dtype
        with frozen(link.module, link.hold, dtype, name=link.name, keep=_all) as mode, torch.no_grad():
            paths = {path for path in vars(weights).values() if path is not None}
            handles = [link.module.get_submodule(path).register_forward_hook(remember(path)) for path in paths]
            hidden = link.call.hidden.clone()
            x = mode.enter(hidden)
            try:
                post = mode.live(link.call(hidden))
            finally:
                for handle in handles:
                    handle.remove()

        def diagonal(path: str | None) -> Tensor | None:
            return None if path is None else _diagonal(seen[path][1], seen[path][0])

        inner = seen[weights.down][0]
        (probs,) = mode.probabilities.values()
        attn_in, mlp_in = diagonal(weights.attn_norm), diagonal(weights.mlp_norm)
        assert attn_in is not None
        assert mlp_in is not None
        held = _Coefficients(
            attn_in=attn_in,
            attn_out=diagonal(weights.attn_post),
            mlp_in=mlp_in,
            mlp_out=diagonal(weights.mlp_post),
            up=_diagonal(inner, seen[weights.up][1]),
            gate=_diagonal(inner, seen[weights.gate][1]),
            probs=probs[0].to(dtype),
        )
        return held, x, post

    def _compare(self, cotangent: Tensor, pulled: Tensor) -> None:
        """Refuse when the generic link pulls a column `[T, 1, d]` somewhere else."""
        generic = batched_vjp(self._output, self._input, cotangent.transpose(0, 1)[None])[0]
        error = ((pulled.transpose(0, 1) - generic).norm() / generic.norm()).item()
        if not error <= _AGREEMENT[pulled.dtype]:
            raise NotExactError(f"{self._name}: explicit and generic products differ by {error:.1e}")

    def vjp(self, block: Float[Tensor, "n T d"], active: slice, chunk: int | None) -> slice:
        """Pull a block of cotangents through the layer, in place.

        Parameters
        ----------
        block
            The cotangents; those outside `active` are zero. Fastest when its memory is laid out as `[T, n, d]`.
        active
            The positions that have cotangents.
        chunk
            How many columns at a time.

        Returns
        -------
        slice
            The positions that have cotangents now: all that the active ones attend to.

        Notes
        -----
        Cost: 2 T d^2 (f + n) flops for the MLP, 2 n T d (H + H_kv) d_head for V and O, 2 n T^2 H d_head for mixing.
        """
        check = torch.zeros_like(self._output).transpose(0, 1)
        random = torch.Generator().manual_seed(0)
        check[active] = torch.randn(check[active].shape, generator=random, dtype=check.dtype).to(check.device)
        pulled = check.clone()
        chunks = [*block.transpose(0, 1).split(chunk or len(block), dim=1), pulled]
        for group in _groups(active, self._down.shape):
            maps = self._mlp_maps(group)
            for part in chunks:
                moved = self._room("moved", maps.shape[0], part.shape[1], part.shape[2])
                part[group] += torch.bmm(part[group].to(maps.device), maps, out=moved).to(part.device)
        later = self._held.probs[:, active, active.stop :]
        reached = slice(0, len(check) if later.any() else active.stop)
        for part in chunks:
            part[reached] += self._attention(part[active], active, reached).to(part.device)
        self._compare(check, pulled)
        return reached

    def _room(self, name: str, *shape: int) -> Tensor:
        return self._workspace(name, self._down, *shape)

    def _mlp_maps(self, group: slice) -> Float[Tensor, "g d d"]:
        """M_t - I for a group of positions: the residual stream is added behind the product, which rounds less."""
        held = self._held
        f, d = self._up.shape
        g = group.stop - group.start
        inner = self._room("inner", f, g, d)
        branches = [(held.up, self._up), (held.gate, self._gate)]
        live = [(factors[group].T[:, :, None], weight[:, None]) for factors, weight in branches if factors is not None]
        torch.mul(*live[0], out=inner)
        for factors, weight in live[1:]:
            inner.addcmul_(factors, weight)
        maps = (
            torch.mm(self._down, inner.view(f, g * d), out=self._room("maps", d, g * d)).view(d, g, d).transpose(0, 1)
        )
        if held.mlp_out is not None:
            maps *= held.mlp_out[group, :, None]
        maps *= held.mlp_in[group, None]
        return maps

    def _attention(self, cotangents: Tensor, active: slice, reached: slice) -> Float[Tensor, "S n d"]:
        held = self._held
        G = cotangents.to(self._o.device)
        if held.attn_out is not None:
            G = torch.mul(G, held.attn_out[active, None], out=self._room("scaled", *G.shape))
        length, n, d = G.shape
        n_heads, inner = held.probs.shape[0], self._o.shape[1]
        d_head = inner // n_heads
        n_kv = self._v.shape[0] // d_head
        by_position = torch.mm(G.reshape(-1, d), self._o, out=self._room("by_position", length * n, inner))
        by_head = self._room("by_head", n_kv, n_heads // n_kv, length, n, d_head)
        by_head.copy_(by_position.view(length, n, n_kv, -1, d_head).permute(2, 3, 0, 1, 4))
        probs = held.probs[:, active, reached].reshape(n_kv, -1, reached.stop)
        mixed = probs.transpose(1, 2) @ by_head.view(n_kv, -1, n * d_head)
        values = mixed.view(n_kv, reached.stop, n, d_head).permute(1, 2, 0, 3).reshape(-1, n_kv * d_head)
        pulled = torch.mm(values, self._v, out=self._room("pulled", len(values), d)).view(reached.stop, n, d)
        return pulled.mul_(held.attn_in[reached, None])


def _groups(positions: slice, down: torch.Size) -> list[slice]:
    """Cut positions so that the matrices formed at once stay small beside a memory budget."""
    d, f = down
    size = max(1, _FORMED_NUMBERS // (d * (d + f)))
    return [slice(t, min(t + size, positions.stop)) for t in range(positions.start, positions.stop, size)]


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


def _all(probs: Tensor) -> Tensor:
    return probs


def _diagonal(output: Tensor, source: Tensor) -> Tensor | None:
    """The factors `[T, n]` of an element-wise linear operation; None where nothing flows."""
    (factors,) = torch.autograd.grad(output.sum(), source, retain_graph=True, allow_unused=True)
    return None if factors is None else factors[0]
