"""Reads the frozen coefficients of layers while their frozen forward pass runs, and proves that they rebuild it.

A norm, or the product in the middle of an MLP, multiplies each number by a frozen factor: y = c * x on the linear path.
So x becomes a leaf of the graph, and c = dy/dx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.freeze import Frozen
from loclin.freeze.pattern import Pattern
from loclin.freeze.status import Live
from loclin.network import explicit
from loclin.network.anatomy import Anatomy, Weights
from loclin.network.autograd import grad
from loclin.network.blocks import LayerCoefficients, Workspace
from loclin.network.proof import LayerRecord, Passed
from loclin.network.sequence import BlockSequence


class CoefficientReader:
    """Reads one layer's coefficients; not `readable` once nothing live flows through a part that the table names."""

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
                yield from self._hook_norm(field, self.layer.get_submodule(path))
        for path in dict.fromkeys((weights.gate, weights.up)):
            branch = self.layer.get_submodule(path)
            yield branch.register_forward_pre_hook(self._pause_graph)
            yield branch.register_forward_hook(self._start_branch(path))
        yield self.layer.get_submodule(weights.down).register_forward_pre_hook(self._end_branches)

    def coefficients(self, pattern: Pattern) -> LayerCoefficients | None:
        """The coefficients of the last forward pass, with its attention pattern."""
        factors, weights = self._factors, self._weights
        if not self.readable or not {weights.gate, weights.up} <= factors.keys():
            return None
        gate, up = factors[weights.gate], factors[weights.up]
        if weights.fused and up is not None:
            gate, up = up.chunk(2, -1)
            split = self._mode.options.gate  # what is frozen has no factors
            gate, up = None if split == "activation" else gate, None if split == "up" else up
        return LayerCoefficients(
            attn_in=factors.get("attn_norm"),
            attn_out=factors.get("attn_post"),
            mlp_in=factors.get("mlp_norm"),
            mlp_out=factors.get("mlp_post"),
            up=up,
            gate=gate,
            pattern=pattern.to(self._mode.dtype),
        )

    def forget(self) -> None:
        """Free the coefficients of the last forward pass."""
        self._factors.clear()
        self._branches.clear()

    def _hook_norm(self, name: str, norm: nn.Module) -> Iterator[RemovableHandle]:
        before: dict[str, Any] = {}

        def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before["status"], before["leaf"] = self._mode.status(args[0]), self._start(args[0])

        def leave(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            (self._factors[name],) = self._end(output, [before.pop("leaf")])
            self._mode.attach(args[0], before.pop("status"))

        yield norm.register_forward_pre_hook(enter)
        yield norm.register_forward_hook(leave)

    def _pause_graph(self, _module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        self._mode.graph = False  # the branch before has begun one, and what this matrix gives becomes a leaf

    def _start_branch(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self._branches[path] = self._start(output)

        return hook

    def _end_branches(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ends = self._end(args[0], list(self._branches.values()))
        self._factors |= dict(zip(self._branches, ends, strict=True))

    def _start(self, tensor: Tensor) -> Tensor:
        """Put a leaf in the place of a tensor's linearised value, and build a graph from there on."""
        status = self._mode.status(tensor)
        if not isinstance(status, Live):
            self.readable = False
            return tensor
        leaf = status.linear.detach().clone().requires_grad_()
        self._mode.graph = True
        self._mode.attach(tensor, Live(leaf, status.root, status.active, status.nonlinear))
        return leaf

    def _end(self, tensor: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
        """The factors between leaves and a tensor: its derivative, where every number depends on its own leaf only."""
        status = self._mode.status(tensor)
        self._mode.graph = False
        if not isinstance(status, Live) or not status.linear.requires_grad:
            self.readable = False
            return [None] * len(leaves)
        found = grad(status.linear, leaves, torch.ones_like(status.linear), allow_unused=True)
        self._mode.attach(tensor, Live(status.linear.detach(), status.root, status.active, status.nonlinear))
        return [None if factors is None else factors[0] for factors in found]


class ExplicitLayers:
    """Which layers explicit products rebuild (`exact`), which are `biased`, and coefficients up to `keep` bytes."""

    def __init__(self, mode: Frozen, sequence: BlockSequence, anatomy: Anatomy, keep: int) -> None:
        self._mode, self._free_bytes = mode, keep
        generic = mode.options.ordinary or sequence.fallback_reason is not None
        self._weights = None if generic else anatomy.weights
        self._readers: list[CoefficientReader | None] = [self._reader(block.module) for block in sequence.blocks]
        self._records = [
            LayerRecord(mode, reader.layer, self._weights) if reader is not None and self._weights is not None else None
            for reader in self._readers
        ]
        self._workspace = Workspace()
        self._mixed: Passed | None = None
        n = max(1, len(sequence.blocks))
        self.exact, self.biased = [False] * n, [True] * n
        self.kept: list[LayerCoefficients | None] = [None] * n

    def _reader(self, layer: nn.Module) -> CoefficientReader | None:
        if self._weights is None or not explicit.available(layer, self._weights, self._mode.dtype):
            return None
        return CoefficientReader(self._mode, layer, self._weights)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every layer's parts."""
        records = (record.hooks() for record in self._records if record is not None)
        readers = (reader.hooks() for reader in self._readers if reader is not None)
        return chain.from_iterable((*records, *readers))  # records what a matrix gave before a reader puts a leaf there

    def see_mixing(self, values: Tensor, mixed: Tensor) -> None:
        """Remember what an attention in blocks was given and gave `[1, H, T, d_head]`, until a layer is collected."""
        self._mixed = values.detach()[0], mixed.detach()[0].clone()

    def collect(self, index: int, x: Tensor, y: Tensor, pattern: Pattern | None) -> None:
        """Take a layer's coefficients after it ran from x to y `[1, T, d]`, if they rebuild y."""
        reader, record, mixed, self._mixed = self._readers[index], self._records[index], self._mixed, None
        if reader is None or record is None or self._weights is None:
            return
        coefficients = None if pattern is None else reader.coefficients(pattern)
        reader.forget()
        if coefficients is not None:
            parts = self._weights, coefficients, self._mode.dtype, self._workspace
            layer = explicit.ExplicitLayer(reader.layer, *parts)
            error = record.error(layer, coefficients, mixed, self._workspace, x[0], y[0])
            self.exact[index] = bool(error <= explicit.AGREEMENT[self._mode.dtype])
            self.biased[index] = layer.biased or not self.exact[index]
        record.forget()
        if coefficients is not None and self.exact[index] and coefficients.nbytes <= self._free_bytes:
            self._free_bytes -= coefficients.nbytes
            self.kept[index] = replace(coefficients, pattern=coefficients.pattern.unwatched())
