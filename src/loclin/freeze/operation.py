"""One intercepted torch operation, and how it is done again on the linear path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.freeze.hold import Hold
from loclin.freeze.status import Held, Live, Misuse, Origin, Status

Result = Status | list[Status]
Slot = int | str
"""An argument's place: its position, or its name."""


_NUMBERS: dict[str, tuple[Slot, ...]] = {
    **dict.fromkeys(("add", "radd", "sub", "subtract", "rsub", "iadd", "isub"), (1, "other")),
    "where": (1, 2, "input", "other"),
    "masked_fill": (2, "value"),
    "index_fill": (3, "value"),
    "setitem": (2,),
    "fill": (1, "value"),
}
"""Where a plain number is a constant that is added, or put beside what is live."""


@runtime_checkable
class Context(Protocol):
    """What an operation needs of the freezing context."""

    hold: Hold
    dtype: torch.dtype
    caps: bool

    def status(self, value: Any) -> Status:
        """What is known of a tensor."""

    def origin(self, operation: str) -> Origin:
        """The place in the model that is running."""

    def constant(self, value: Tensor, original: Any, operation: str) -> Tensor:
        """A constant that is added to a live tensor; a leaf where constants are collected."""

    def keep_probabilities(self, probs: Tensor) -> None:
        """Remember attention probabilities `[B, H, T, T]`."""


@dataclass
class Operation:
    """A call of a torch function whose arguments depend on the input.

    Attributes
    ----------
    context
        The freezing context.
    name
        The function's plain name: `add` for `Tensor.add`, `Tensor.__add__`, `torch.add` and `add_`.
    func, args, kwargs
        The call.
    in_place
        Whether it changes its first argument.
    before
        For calls in place, what the first argument was before.
    out
        What the model's own call gave.
    """

    context: Context
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool
    before: Tensor | None
    out: Any

    __repr__ = brief

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def value(self, tensor: Tensor) -> Tensor:
        """A tensor's value before the call."""
        return self.before if self.in_place and self.before is not None and tensor is self.args[0] else tensor

    def status(self, value: Any) -> Status:
        """What is known of an argument."""
        return self.context.status(value)

    def dependents(self) -> list[tuple[Slot, Tensor, Live | Held]]:
        """The tensor arguments that depend on the input: (place, tensor, status)."""
        return [
            (slot, tensor, status)
            for slot, argument in self._slots()
            for tensor in _tensors(argument)
            if (status := self.status(tensor)) is not None
        ]

    def _slots(self) -> Iterator[tuple[Slot, Any]]:
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor's value in the linear path's dtype: a held coefficient."""
        value = self.value(tensor).detach()
        return value.to(self.context.dtype) if value.is_floating_point() else value

    def again(self, live: Callable[[Slot], bool], additive: Callable[[Slot], bool]) -> Any:
        """The call on the linear path.

        Parameters
        ----------
        live
            The places whose tensors stay live; those of other dependents are held.
        additive
            The places whose constants are added to what is live.
        """
        args = [self._twin(slot, value, live, additive) for slot, value in enumerate(self.args)]
        kwargs = {
            slot: self._twin(slot, value, live, additive)
            for slot, value in self.kwargs.items()
            if slot not in ("dtype", "out")
        }
        if self.in_place and args[0].is_leaf and args[0].requires_grad:
            args[0] = args[0].clone()
        done = self.func(*args, **kwargs)
        return args[0] if self.in_place else done

    def _twin(self, slot: Slot, value: Any, live: Callable[[Slot], bool], additive: Callable[[Slot], bool]) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._twin(slot, item, live, additive) for item in value)
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

    def wrap(self, linear: Any, root: object = None, active: bool = False, broken: Misuse | None = None) -> Result:
        """Live statuses for what the call gave on the linear path, in the order of its results."""
        if isinstance(linear, Tensor):
            return Live(linear, object() if root is None else root, active, broken)
        return [
            Live(item, active=active, broken=broken) if isinstance(item, Tensor) and item.is_floating_point() else None
            for item in linear
        ]

    def broken(self, places: Callable[[Slot], bool]) -> Misuse | None:
        """What makes the twin of a result differ from it: a broken argument, or a coefficient that is added."""
        for slot, tensor, status in self.dependents():
            if places(slot):
                if isinstance(status, Live) and status.broken is not None:
                    return status.broken
                if isinstance(status, Held) and bool(self.value(tensor).any()):
                    out = self.out if isinstance(self.out, Tensor) else self.args[0]
                    size = out.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
                    return Misuse(status.origin, min(1.0, (self.value(tensor).double().norm() / size).item()))
        return None

    def held(self, probabilities: bool = False, root: object = None) -> Held:
        """The status of a result that is not affine."""
        return Held(self.context.origin(self.name), object() if root is None else root, probabilities)


def words(names: str) -> frozenset[str]:
    """A set of operations, written as one text."""
    return frozenset(names.split())


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _tensors(item)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value != 0


def everywhere(_slot: Slot) -> bool:
    """Every place."""
    return True


def nowhere(_slot: Slot) -> bool:
    """No place."""
    return False
