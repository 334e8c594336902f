"""One intercepted torch operation, and its call on the linear path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.freeze.options import FreezeOptions
from loclin.freeze.pattern import Pattern
from loclin.freeze.scores import ScoreRow
from loclin.freeze.status import Coefficient, Live, NonlinearUse, Origin, Status

Result = Status | list[Status]
Slot = int | str
"""An argument's position or name."""
_NUMBERS: dict[str, tuple[Slot, ...]] = {
    **dict.fromkeys(("add", "radd", "sub", "subtract", "rsub", "iadd", "isub"), (1, "other")),
    "where": (1, 2, "input", "other"),
    "masked_fill": (2, "value"),
    "index_fill": (3, "value"),
    "setitem": (2,),
    "fill": (1, "value"),
}
"""Slots where a plain number is a constant that is added to live tensors, or put beside them."""


class _Context(Protocol):
    """What an operation needs from the freezing context, `loclin.freeze.mode.Frozen`."""

    options: FreezeOptions
    dtype: torch.dtype
    soft_caps: bool
    attention_bytes: int | None
    see_mixing: Callable[[Tensor, Tensor], None] | None
    scores: ScoreRow | None

    def status(self, value: Any) -> Status: ...
    def origin(self, operation: str) -> Origin: ...
    def constant(self, value: Tensor, original: Any, operation: str) -> Tensor: ...
    def keep_probabilities(self, probs: Tensor) -> None: ...
    def keep_pattern(self, pattern: Pattern) -> None: ...
    def repeats(self, out: Any) -> bool: ...


@dataclass
class Operation:
    """A call of a torch function whose arguments depend on the input."""

    context: _Context
    name: str  # plain: `add` for `Tensor.add`, `Tensor.__add__`, `torch.add` and `add_`
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool  # the call changes its first argument
    before: Tensor | None  # for calls in place, the first argument's value before
    out: Any  # of the model's own call

    __repr__ = brief

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def value(self, tensor: Tensor) -> Tensor:
        """A tensor's value before the call."""
        return self.before if self.in_place and self.before is not None and tensor is self.args[0] else tensor

    def status(self, value: Any) -> Status:
        """An argument's status."""
        return self.context.status(value)

    def dependents(self) -> list[tuple[Slot, Tensor, Live | Coefficient]]:
        """The tensor arguments that depend on the input: (slot, tensor, status)."""
        arguments: list[tuple[Slot, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return [
            (slot, tensor, status)
            for slot, argument in arguments
            for tensor in _tensors(argument)
            if (status := self.status(tensor)) is not None
        ]

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor's value in the linear path's dtype: a frozen coefficient."""
        value = self.value(tensor).detach()
        return value.to(self.context.dtype) if value.is_floating_point() else value

    def recompute(self, live: Callable[[Slot], bool], additive: Callable[[Slot], bool]) -> Any:
        """The call on the linear path.

        Tensors in `live` slots stay live, others are frozen; constants in `additive` slots are added to live tensors.
        """
        if self.context.repeats(self.out):
            return _out_of_any_graph(self.out)

        def linear(slot: Slot, value: Any) -> Any:
            return self._linear_argument(slot, value, live, additive)

        args = [linear(slot, value) for slot, value in enumerate(self.args)]
        kwargs = {slot: linear(slot, value) for slot, value in self.kwargs.items() if slot not in ("dtype", "out")}
        if self.in_place and args[0].is_leaf and args[0].requires_grad:
            args[0] = args[0].clone()
        done = self.func(*args, **kwargs)
        return args[0] if self.in_place else done

    def _linear_argument(
        self, slot: Slot, value: Any, live: Callable[[Slot], bool], additive: Callable[[Slot], bool]
    ) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._linear_argument(slot, item, live, additive) for item in value)
        status = self.status(value)
        if isinstance(status, Live) and live(slot):
            return status.linear
        if isinstance(value, Tensor) and value.is_floating_point():
            if status is None and additive(slot):
                return self.context.constant(self.cast(value), value, self.name)
            return self.cast(value)
        if slot in _NUMBERS.get(self.name, ()) and _is_number(value) and additive(slot):
            return self.context.constant(torch.tensor(float(value), dtype=self.context.dtype), value, self.name)
        return value

    def wrap(
        self, linear: Any, root: object = None, active: bool = False, nonlinear: NonlinearUse | None = None
    ) -> Result:
        """Live statuses for the results of the call on the linear path, in their order."""
        if isinstance(linear, Tensor):
            return Live(linear, object() if root is None else root, active, nonlinear)
        return [
            Live(item, active=active, nonlinear=nonlinear)
            if isinstance(item, Tensor) and item.is_floating_point()
            else None
            for item in linear
        ]

    def nonlinear(self, slots: Callable[[Slot], bool]) -> NonlinearUse | None:
        """What makes a result nonlinear: an argument that is nonlinear, or a coefficient that is added."""
        for slot, tensor, status in self.dependents():
            if slots(slot):
                if isinstance(status, Live) and status.nonlinear is not None:
                    return status.nonlinear
                if isinstance(status, Coefficient) and bool(self.value(tensor).any()):
                    out = self.out if isinstance(self.out, Tensor) else self.args[0]
                    size = out.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
                    return NonlinearUse(status.origin, min(1.0, (self.value(tensor).double().norm() / size).item()))
        return None

    def constant(self) -> Live:
        """The status of a result that is the same for every input, once coefficients are frozen."""
        return Live(self.context.constant(self.cast(self.out), self.out, self.name))

    def coefficient(self, probabilities: bool = False, root: object = None) -> Coefficient:
        """The status of a result that is not affine in the input."""
        return Coefficient(self.context.origin(self.name), object() if root is None else root, probabilities)


def words(names: str) -> frozenset[str]:
    """A set of operations, from one string."""
    return frozenset(names.split())


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _tensors(item)


def _out_of_any_graph(out: Any) -> Any:
    if isinstance(out, tuple | list):
        return [_out_of_any_graph(item) for item in out]
    return out.detach() if isinstance(out, Tensor) else out


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value != 0


def everywhere(_slot: Slot) -> bool:
    """Every slot."""
    return True


def nowhere(_slot: Slot) -> bool:
    """No slot."""
    return False
