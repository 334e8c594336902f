"""Inside a layer: what its heads give and what its MLP's neurons are, found by watching and proved by their sum.

Heads are equal parts of what enters the attention's output projection, neurons the units that enter the MLP's. Nothing
here knows families. While a frozen layer runs, its linear modules are noted; the last one through which all of a part's
output goes, biases behind it aside, is the part's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.common.sums import square_sums
from loclin.freeze import Frozen
from loclin.freeze.status import Live
from loclin.network.explicit import AGREEMENT
from loclin.network.route import Parts

Constants = list[tuple[str, Tensor]]
"""(name, leaf) of what is added to live tensors."""


_COARSE = 0.1
"""How far apart sums may be in half precision, see `AGREEMENT`."""


@dataclass(frozen=True)
class Projection:
    """The last linear module of an attention or an MLP.

    Attributes
    ----------
    path
        Its path, from the layer.
    source
        What enters it, in the layer's graph: T vectors of n numbers, in any shape.
    count
        How many heads or neurons that is: equal parts, side by side.
    behind
        The constants that are added behind it.
    """

    path: str
    source: Tensor
    count: int
    behind: Constants

    __repr__ = brief

    def alone(self, units: Float[Tensor, "*shape"], index: int) -> Float[Tensor, "*shape"]:
        """Heads or neurons side by side in the last dimension, with all but one put to zero."""
        kept = torch.zeros_like(units)
        kept.unflatten(-1, (self.count, -1))[..., index, :] = units.unflatten(-1, (self.count, -1))[..., index, :]
        return kept


@dataclass(frozen=True, eq=False)
class _Call:
    """A linear module's call: what entered it, how wide its output was, and whether attention had mixed before."""

    path: str
    source: Tensor
    width: int
    mixed: int


@dataclass
class Inside:
    """Watches one frozen pass of a layer; see `LayerLink.graph`.

    Attributes
    ----------
    parts
        Where the layer's attention and MLP end.
    probs
        The attention probabilities `[H, T, S]`, one map for each query head; None where nothing attends.
    """

    parts: Parts
    probs: Tensor | None = None
    _calls: list[_Call] = field(default_factory=list)
    _mixes: int = 0
    _attended: int = 0
    _layer: nn.Module = field(default_factory=nn.Identity)
    _name: str = ""
    _mixers: Mapping[str, Tensor] = field(default_factory=dict)

    __repr__ = brief

    def keep(self, probs: Float[Tensor, "1 H T S"]) -> Tensor:
        """Take the attention probabilities."""
        self.probs = probs[0].detach()
        self._mixes += 1
        return probs

    def hooks(self, mode: Frozen, layer: nn.Module, name: str) -> Iterator[RemovableHandle]:
        """Hook the linear modules of a layer called `name`; those in a list are experts, which see some tokens only."""
        self._layer, self._name, self._mixers = layer, name, mode.probabilities
        experts = [path for path, module in layer.named_modules() if isinstance(module, nn.ModuleList)]
        for path, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            listed = any(path.startswith(f"{home}.") for home in experts)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not listed:
                yield module.register_forward_hook(self._left(mode, path))
        if self.parts.attn is not None:
            yield layer.get_submodule(self.parts.attn).register_forward_hook(self._attention_left)

    def _attention_left(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._attended = len(self._calls)

    def _left(self, mode: Frozen, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            status = mode.status(args[0]) if args else None
            if isinstance(status, Live) and isinstance(output, Tensor):
                self._calls.append(_Call(path, status.linear, output.shape[-1], self._mixes))

        return hook

    def projection(self, kind: str, output: Float[Tensor, "1 T d"], constants: Constants) -> Projection | None:
        """Find the projection whose `output` is a layer's `attn_out` or `mlp_out`; None where it has none.

        Cost: a product with the output's own graph, back to what enters the projection, for each module tried.
        """
        calls = self._behind_heads() if kind == "attn_out" else self._behind_neurons()
        _, length, width = output.shape
        for call in reversed(calls):
            inner = call.source.shape[-1]
            if call.width == width and call.source.numel() == length * inner and call.source.requires_grad:
                count = inner if self.probs is None or kind == "mlp_out" else len(self.probs)
                found = Projection(call.path, call.source, count, _behind(call.source, output, constants))
                if inner % count == 0 and _carries_all(found, output):
                    return found
        return None

    def why_whole(self, kind: str) -> str:
        """Why `projection` finds nothing, naming the module."""
        path = self.parts.attn if kind == "attn_out" else self.parts.mlp
        if path is None:
            return f"no module of {type(self._layer).__name__} gives {kind} alone"
        name = f"{path} ({type(self._layer.get_submodule(path)).__name__})"
        if kind == "mlp_out":
            return f"{name} has no one projection that its neurons enter (of experts, each has its own)"
        return f"{name} has no attention heads" if self.probs is None else f"{name} has no output projection to be seen"

    def _behind_heads(self) -> list[_Call]:
        """The calls behind the last mixing, in the module that mixes."""
        if self.probs is None:
            return []
        home, _, _ = [*self._mixers][-1].removeprefix(self._name).strip(".").partition(".")
        return [call for call in self._calls if call.mixed == self._mixes and call.path.startswith(home)]

    def _behind_neurons(self) -> list[_Call]:
        """The MLP's calls but for the first, whose input is the MLP's own."""
        own = [call for call in self._calls if call.path.startswith(f"{self.parts.mlp}.")]
        if len(own) < 2:  # the MLP ends in a norm, or in its own last module
            own = self._calls[self._attended :]
        return [call for call in own if call.source is not own[0].source]


def _behind(source: Tensor, output: Tensor, constants: Constants) -> Constants:
    """The constants that the output depends on, and `source` does not."""
    if not constants:
        return []
    leaves = [leaf for _, leaf in constants]
    reached, before = (
        torch.autograd.grad(end.sum(), leaves, retain_graph=True, allow_unused=True) for end in (output, source)
    )
    return [one for one, out, into in zip(constants, reached, before, strict=True) if out is not None and into is None]


def _carries_all(projection: Projection, output: Tensor) -> bool:
    """Whether an output is the sum of what its projection's source and the constants behind it give.

    Tried on the output itself: the products of the output with its parts sum to its squared length.
    """
    parts = [projection.source, *(leaf for _, leaf in projection.behind)]
    pulled = torch.autograd.grad(output, parts, output.detach(), retain_graph=True, allow_unused=True)
    found = sum((g.double() * p.detach().double()).sum() for g, p in zip(pulled, parts, strict=True) if g is not None)
    squared = square_sums(output)
    return bool((found - squared).abs() <= AGREEMENT.get(output.dtype, _COARSE) * squared)
