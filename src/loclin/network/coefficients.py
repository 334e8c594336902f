"""What is held in one layer, read off its frozen forward pass as plain tensors: what explicit products are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.freeze import Frozen
from loclin.freeze.status import Live
from loclin.network.anatomy import Weights


@dataclass(frozen=True)
class Coefficients:
    """What is held in one layer: norms `[T, d]`, the MLP's branches `[T, f]`, attention `[H, T, T]`.

    None where there is no such norm, or nothing flows through a branch.
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

    def to(self, dtype: torch.dtype) -> Coefficients:
        """The same in another dtype."""
        return replace(self, **{name: part.to(dtype) for name, part in vars(self).items() if part is not None})


class Reader:
    """Reads a layer's coefficients while its frozen forward pass runs.

    Where a norm, or the product in the middle of an MLP, begins, the linear path gets a leaf; where it ends, the
    factors are the derivative by that leaf. The path itself goes on with the values it had.

    Parameters
    ----------
    mode
        The context in which the layer runs.
    layer, weights
        The layer, and where its parts are.

    Attributes
    ----------
    readable
        False once a part was met through which nothing live flows: the layer is not built as its entry says.
    """

    def __init__(self, mode: Frozen, layer: nn.Module, weights: Weights) -> None:
        self._mode, self.layer, self._weights = mode, layer, weights
        self._factors: dict[str, Tensor | None] = {}
        self._branches: dict[str, Tensor] = {}
        self.readable = True

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the layer's parts."""
        weights = self._weights
        for field in ("attn_norm", "attn_post", "mlp_norm", "mlp_post"):
            path = getattr(weights, field)
            if path is not None:
                yield from self._norm(field, self.layer.get_submodule(path))
        for path in dict.fromkeys((weights.gate, weights.up)):
            yield self.layer.get_submodule(path).register_forward_hook(self._branch(path))
        yield self.layer.get_submodule(weights.down).register_forward_pre_hook(self._product)

    def found(self, probs: Tensor) -> Coefficients | None:
        """What the last forward pass held; `probs` are its attention probabilities `[1, H, T, T]`."""
        factors, weights = self._factors, self._weights
        if not self.readable or not {weights.gate, weights.up} <= factors.keys():
            return None
        gate, up = factors[weights.gate], factors[weights.up]
        if weights.fused and up is not None:
            gate, up = (half if half.any() else None for half in up.chunk(2, -1))
        return Coefficients(
            attn_in=factors.get("attn_norm"),
            attn_out=factors.get("attn_post"),
            mlp_in=factors.get("mlp_norm"),
            mlp_out=factors.get("mlp_post"),
            up=up,
            gate=gate,
            probs=probs[0].to(self._mode.dtype),
        )

    def forget(self) -> None:
        """Let go of what the last forward pass held."""
        self._factors.clear()
        self._branches.clear()

    def _norm(self, name: str, norm: nn.Module) -> Iterator[RemovableHandle]:
        before: dict[str, Any] = {}

        def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before["status"], before["leaf"] = self._mode.status(args[0]), self._start(args[0])

        def leave(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            (self._factors[name],) = self._end(output, [before.pop("leaf")])
            self._mode.attach(args[0], before.pop("status"))

        yield norm.register_forward_pre_hook(enter)
        yield norm.register_forward_hook(leave)

    def _branch(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self._branches[path] = self._start(output)

        return hook

    def _product(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ends = self._end(args[0], list(self._branches.values()))
        self._factors |= dict(zip(self._branches, ends, strict=True))

    def _start(self, tensor: Tensor) -> Tensor:
        status = self._mode.status(tensor)
        if not isinstance(status, Live):
            self.readable = False
            return tensor
        leaf = status.linear.detach().clone().requires_grad_()
        self._mode.graph = True
        self._mode.attach(tensor, Live(leaf, status.root, status.active, status.broken))
        return leaf

    def _end(self, tensor: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
        status = self._mode.status(tensor)
        self._mode.graph = False
        if not isinstance(status, Live) or not status.linear.requires_grad:
            self.readable = False
            return [None] * len(leaves)
        found = torch.autograd.grad(status.linear, leaves, torch.ones_like(status.linear), allow_unused=True)
        self._mode.attach(tensor, Live(status.linear.detach(), status.root, status.active, status.broken))
        return [None if factors is None else factors[0] for factors in found]
