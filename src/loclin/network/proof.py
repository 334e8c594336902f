"""The proof of a layer's explicit products: at every position they rebuild the value that the layer had in the trace.

To make all blocks of a long prompt's P again costs more than all else. There the products are computed at some
positions, and followed at all of them with what each module gave in the place of W x, and what the attention gave in
the place of P V: each must have been given what the products give it, and the end must be the layer's value. Each W x
is proved at all positions, along random directions. So what is not done twice is torch's own attention elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.freeze import Frozen
from loclin.freeze.pattern import BlockPattern
from loclin.freeze.status import Live
from loclin.network.anatomy import Weights
from loclin.network.blocks import LayerCoefficients, Workspace
from loclin.network.explicit import ExplicitLayer
from loclin.network.matrix import Matrix

_STRETCHES, _STRETCH = 4, 128
_DIRECTIONS = 4

Passed = tuple[Tensor, Tensor]
"""What was given to a module, and what it gave, on the linear path."""
Note = Callable[[Tensor, Tensor], None]


def proved_positions(length: int) -> list[slice]:
    """The positions at which explicit products are computed whole: all, or of a long prompt four stretches.

    The first and the last positions are among them.
    """
    if length <= 2 * _STRETCHES * _STRETCH:
        return [slice(0, length)]
    starts = (i * (length - _STRETCH) // (_STRETCHES - 1) for i in range(_STRETCHES))
    return [slice(start, start + _STRETCH) for start in starts]


class LayerRecord:
    """What passes the matrices and the attention of a layer while it runs, if the prompt is long."""

    def __init__(self, mode: Frozen, layer: nn.Module, weights: Weights) -> None:
        self._mode, self._layer, self._weights = mode, layer, weights
        self._passed: dict[str, Passed] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the layer's matrices."""
        for path in dict.fromkeys(self._weights.matrices):
            yield self._layer.get_submodule(path).register_forward_hook(partial(self._leave, path))

    def _leave(self, path: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        statuses = [self._mode.status(tensor) for tensor in (*args[:1], output)]
        if len(proved_positions(output.shape[-2])) > 1 and all(isinstance(status, Live) for status in statuses):
            given, gave = (status.linear.detach()[0] for status in statuses if isinstance(status, Live))
            self._passed[path] = given, gave.clone()  # the model may change its own in place

    def forget(self) -> None:
        """Free what was recorded."""
        self._passed.clear()

    def error(
        self,
        layer: ExplicitLayer,
        coefficients: LayerCoefficients,
        mixed: Passed | None,
        workspace: Workspace,
        x: Float[Tensor, "T d"],
        y: Float[Tensor, "T d"],
    ) -> Tensor:
        """How far the products are from what the layer did from x to y: of all parts and positions, the most.

        Relative to the numbers at that position. Cost: one column; of a long prompt, one at `proved_positions`, and
        twelve passes over what the layer's modules gave.
        """
        found, rows, pattern = _Errors(), [slice(0, len(x))], coefficients.pattern
        recorded = self._passed.keys() == set(self._weights.matrices)
        if recorded and mixed is not None and isinstance(pattern, BlockPattern):
            rows = proved_positions(len(x))
            replayed = replace(coefficients, pattern=_ReplayedPattern(**vars(pattern), mixed=mixed, note=found.note))
            parts = self._layer, self._weights, replayed, self._mode.dtype, workspace
            found.note_sum(_ReplayedLayer(self._passed, found.note, *parts).value(x), x, y)
        for some in rows:
            found.note_sum(layer.value(x, some), x[some], y[some])
        return found.most


class _Errors:
    """The largest of relative errors; NaN if one of them is."""

    def __init__(self) -> None:
        self.most = torch.zeros(())

    def note(self, difference: Tensor, *sizes: Tensor) -> None:
        """Note differences `[..., T, n]`, relative to the largest of what stands there."""
        size = torch.stack([torch.linalg.vector_norm(each, dim=-1) for each in sizes]).amax(0)
        error = torch.linalg.vector_norm(difference, dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)
        self.most = torch.maximum(self.most.to(error), error.max())

    def note_sum(self, found: Tensor, x: Tensor, y: Tensor) -> None:
        """Note how far a layer's value is from y, which it made of x: both are sizes of what was added."""
        self.note(found.to(y.device) - y, x.to(y.device), y)


class _ReplayedLayer(ExplicitLayer):
    """Explicit products with what the layer's modules gave in the place of W x and P V."""

    def __init__(self, passed: dict[str, Passed], note: Note, *parts: Any) -> None:
        self._passed, self._note = passed, note
        super().__init__(*parts)

    def matrix(self, name: str, path: str, rows: slice = slice(None)) -> Matrix:
        """A linear module's matrix, or some rows of it, that gives what the module gave."""
        given, gave = self._passed[path]
        return _ReplayedMatrix(super().matrix(name, path, rows), given, gave[:, rows], self._note)


class _ReplayedMatrix(Matrix):
    """A matrix that gives what its module gave, and notes differences from what was given, and from W x + b."""

    def __init__(self, matrix: Matrix, given: Tensor, gave: Tensor, note: Note) -> None:
        vars(self).update(vars(matrix))
        self._given, self._gave, self._note = given, gave, note

    def push(self, x: Tensor, out: Tensor | None = None, affine: bool = False) -> Tensor:  # noqa: ARG002
        """What the module gave `[T, 1, out]`."""
        given, gave = self._given.to(self.device), self._gave.to(self.device)
        self._note(x[:, 0] - given, given)
        some = torch.randn(_DIRECTIONS, gave.shape[-1], generator=torch.Generator().manual_seed(0)).to(gave)
        some /= _DIRECTIONS**0.5  # a difference then keeps its length, on average
        predicted = given @ self.pull(some).T
        if self.bias is not None:
            predicted += some @ self.bias
        self._note(gave @ some.T - predicted, gave)
        return gave[:, None].clone()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _ReplayedPattern(BlockPattern):
    """A pattern whose product is what the attention gave, which notes differences from what it was given."""

    mixed: Passed
    note: Note

    def mix(self, values: Tensor, queries: slice, keys: slice, out: Tensor) -> Tensor:  # noqa: ARG002
        """P V as the attention gave it, at all positions."""
        given, gave = (each.to(values.device) for each in self.mixed)
        given = given.reshape(len(values), -1, *given.shape[-2:])
        self.note(values[:, None] - given, given)
        return out.copy_(gave.reshape(out.shape))
