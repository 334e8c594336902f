"""Inside a layer of any family: attention heads and neurons, found by watching and proved by their sum.

They are equal parts of what enters an output projection: the last linear module through which all of an attention's or
an MLP's output goes, apart from biases that are added behind it.
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
from loclin.freeze.pattern import Pattern
from loclin.freeze.status import Live
from loclin.network.autograd import Constants, grad
from loclin.network.explicit import AGREEMENT
from loclin.network.sequence import Sublayers

_COARSE = 0.1  # how far apart sums may be in half precision, see `AGREEMENT`


@dataclass(frozen=True)
class OutputProjection:
    """The last linear module of an attention or an MLP, at a path from the layer."""

    path: str
    source: Tensor  # what enters it, in the layer's graph: T vectors of n numbers, in any shape
    count: int  # of heads or neurons in it: equal parts, side by side
    behind: Constants  # added behind it

    __repr__ = brief

    def isolate(self, units: Float[Tensor, "*shape"], index: int) -> Float[Tensor, "*shape"]:
        """Heads or neurons side by side in the last dimension, with all but one put to zero."""
        kept = torch.zeros_like(units)
        kept.unflatten(-1, (self.count, -1))[..., index, :] = units.unflatten(-1, (self.count, -1))[..., index, :]
        return kept


@dataclass(frozen=True, eq=False)
class _LinearCall:
    """A linear module's call: its input, the width of its output, and how many attentions had mixed before."""

    path: str
    source: Tensor
    width: int
    mixed: int


@dataclass
class UnitFinder:
    """Finds heads and neurons during one frozen pass of a layer; see `LayerLink.graph`."""

    sublayers: Sublayers
    pattern: Pattern | None = None  # attention; None where nothing attends
    _calls: list[_LinearCall] = field(default_factory=list)
    _mixes: int = 0
    _attended: int = 0
    _layer: nn.Module = field(default_factory=nn.Identity)
    _name: str = ""
    _mixers: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = brief

    def keep(self, pattern: Pattern) -> None:
        """Take the attention pattern."""
        self.pattern = pattern
        self._mixes += 1

    def hooks(self, mode: Frozen, layer: nn.Module, name: str) -> Iterator[RemovableHandle]:
        """Hook the linear modules of a layer called `name`; not those in a list, which are experts for some tokens."""
        self._layer, self._name, self._mixers = layer, name, mode.probabilities
        lists = [path for path, module in layer.named_modules() if isinstance(module, nn.ModuleList)]
        for path, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            is_expert = any(path.startswith(f"{parent}.") for parent in lists)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not is_expert:
                yield module.register_forward_hook(self._leave_linear(mode, path))
        if self.sublayers.attn is not None:
            yield layer.get_submodule(self.sublayers.attn).register_forward_hook(self._leave_attention)

    def _leave_attention(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._attended = len(self._calls)

    def _leave_linear(self, mode: Frozen, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            status = mode.status(args[0]) if args else None
            if isinstance(status, Live) and isinstance(output, Tensor):
                self._calls.append(_LinearCall(path, status.linear, output.shape[-1], self._mixes))

        return hook

    def projection(self, kind: str, output: Float[Tensor, "1 T d"], constants: Constants) -> OutputProjection | None:
        """Find the output projection of `attn_out` or `mlp_out`, if there is one. Cost: a vjp for each module tried."""
        calls = self._calls_behind_mixing() if kind == "attn_out" else self._calls_behind_mlp_input()
        _, length, width = output.shape
        for call in reversed(calls):
            inner = call.source.shape[-1]
            if call.width == width and call.source.numel() == length * inner and call.source.requires_grad:
                count = inner if self.pattern is None or kind == "mlp_out" else self.pattern.shape[0]
                behind = _added_behind(call.source, output, constants)
                found = OutputProjection(call.path, call.source, count, behind)
                if inner % count == 0 and _carries_all(found, output):
                    return found
        return None

    def why_no_projection(self, kind: str) -> str:
        """Why `projection` finds nothing, naming the module."""
        path = self.sublayers.attn if kind == "attn_out" else self.sublayers.mlp
        if path is None:
            return f"no module of {type(self._layer).__name__} has the output {kind}"
        name = f"{path} ({type(self._layer.get_submodule(path)).__name__})"
        if kind == "mlp_out":
            return f"{name} has no single output projection that its neurons enter (each expert has its own)"
        return f"{name} has no attention heads" if self.pattern is None else f"{name} has no output projection"

    def _calls_behind_mixing(self) -> list[_LinearCall]:
        """The calls behind the last mixing of positions, in the module that mixes."""
        if self.pattern is None:
            return []
        home, _, _ = [*self._mixers][-1].removeprefix(self._name).strip(".").partition(".")
        return [call for call in self._calls if call.mixed == self._mixes and call.path.startswith(home)]

    def _calls_behind_mlp_input(self) -> list[_LinearCall]:
        """The MLP's calls, except those that take the MLP's own input."""
        own = [call for call in self._calls if call.path.startswith(f"{self.sublayers.mlp}.")]
        if len(own) < 2:  # the MLP ends in a norm, or in its own last module
            own = self._calls[self._attended :]
        return [call for call in own if call.source is not own[0].source]


def _added_behind(source: Tensor, output: Tensor, constants: Constants) -> Constants:
    """The constants on which the output depends, but not `source`."""
    if not constants:
        return []
    leaves = [leaf for _, leaf in constants]
    reached, before = (grad(end.sum(), leaves, retain_graph=True, allow_unused=True) for end in (output, source))
    return [one for one, out, into in zip(constants, reached, before, strict=True) if out is not None and into is None]


def _carries_all(projection: OutputProjection, output: Tensor) -> bool:
    """Whether y = sum_i A_i p_i over the source and what is behind it: |y|^2 = sum_i <A_i^T y, p_i>, by one vjp."""
    parts = [projection.source, *(leaf for _, leaf in projection.behind)]
    pulled = grad(output, parts, output.detach(), retain_graph=True, allow_unused=True)
    found = sum((g.double() * p.detach().double()).sum() for g, p in zip(pulled, parts, strict=True) if g is not None)
    squared = square_sums(output)
    return bool((found - squared).abs() <= AGREEMENT.get(output.dtype, _COARSE) * squared)
