"""The mode in which every torch operation is done twice: as the model does it, and on the linear path beside it.

The model's own values are never touched. What depends on the input carries a status (see `loclin.freeze.status`), and
each operation's result gets its own from those of the arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from loclin.common.sums import relative
from loclin.freeze.hold import Hold
from loclin.freeze.linear import CASTS
from loclin.freeze.operation import Operation, Result
from loclin.freeze.status import Held, Live, Misuse, Origin, Status
from loclin.freeze.table import HANDLERS, is_in_place, plain_name
from loclin.freeze.widen import without_lowering

UNSEEN = "an operation that loclin cannot see"

Keep = Callable[[Tensor], Tensor]
"""What to remember of a module's attention probabilities `[B, H, T, T]`."""

HeldParts = Callable[[tuple[int, ...]], tuple[int, ...]]
"""(the parts' widths) -> which of them are held."""

_NOT_THE_MODEL = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
"""Folders whose code is not the model's; with the separator, for torchao's is beside torch's."""
_MARK = "_loclin_status"
_ORDINARY = CASTS | {"scaled_dot_product_attention"}
"""What is done as ever where nothing is held: the path keeps its own dtype, and attention knows of it."""


class Frozen(TorchFunctionMode):
    """The freezing context; made by `loclin.freeze.frozen`.

    Attributes
    ----------
    hold
        What is held.
    dtype
        The dtype of the linear path.
    probabilities
        What `keep` made of attention probabilities, by module path.
    constants
        Where constants are collected: (name, leaf) of each that was added to a live tensor.
    misuses
        Coefficients that were used as if they were live: with any, the linear path is not the network.
    lookups
        Rows that other tables than the input embeddings hold of the prompt's tokens: (the table's path, what it gave)
        by the address of their storage.
    graph, collect, caps
        Whether to build the linear path's graph; to make leaves of constants; to take a tanh for a soft cap.
    unseen
        True while a rule's module runs whose own operations are of no interest.
    audit
        A relative error: operations whose twins are further from the model's own values are noted in `misuses`.
    noise
        None, or where operations are noted that draw random numbers.
    """

    def __init__(
        self,
        paths: dict[nn.Module, str],
        hold: Hold,
        dtype: torch.dtype,
        *,
        collect: bool = False,
        keep: Keep | None = None,
    ) -> None:
        super().__init__()
        self.hold, self.dtype = hold, dtype
        self.probabilities: dict[str, Tensor] = {}
        self.constants: list[tuple[str, Tensor]] = []
        self.misuses: list[Misuse] = []
        self.lookups: dict[int, tuple[str, Tensor]] = {}
        self.graph, self.collect, self.caps = True, collect, False
        self.audit: float | None = None
        self.noise: list[Origin] | None = None
        self.unseen = False
        self._wide = hold.precision == "double" and not hold.ordinary
        self._keep, self._paused, self._entered = keep, False, False
        self._held_parts: dict[str, HeldParts] = {}
        self._paths = {id(module): path for module, path in paths.items()}
        self._modules = {path: module for module, path in paths.items()}
        # with the parameters themselves: the id of one that is offloaded in the meantime would be another's
        self._names = {
            id(parameter): (f"{path}.{name}".strip("."), parameter)
            for module, path in paths.items()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do the model's own call, then its twin on the linear path."""
        if self.noise is None:
            return self._do(func, args, kwargs or {})
        before = _random_states()
        out = self._do(func, args, kwargs or {})
        if _random_states() != before:
            self.noise.append(self.origin(plain_name(func)))
        return out

    def _do(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._wide and self._entered and not self._paused and not self.unseen and args and self._is_model_s(args[0]):
            func, args, kwargs = without_lowering(func, plain_name(func), args, kwargs)
        if self._paused or self.unseen or not (self.depends(args) or self.depends(kwargs.values())):
            return func(*args, **kwargs)
        in_place = is_in_place(func, args, kwargs)
        before = args[0].detach().clone() if in_place else None
        with torch.no_grad():
            out = func(*args, **kwargs)
        result = args[0] if in_place else out
        if _has_floats(result):
            op = Operation(self, plain_name(func), func, args, kwargs, in_place, before, result)
            with torch.set_grad_enabled(self.graph):
                found = self._derive(op)
                self._attach_all(result, found)
            if self.audit is not None and isinstance(found, Live):
                self._examine(op, found, self.audit)
        return out

    def _is_model_s(self, value: Any) -> bool:
        """Whether a tensor is a weight, or depends on the input; the tables of rotations stay as the model has them."""
        return isinstance(value, nn.Parameter) or self.status(value) is not None

    def _examine(self, op: Operation, found: Live, limit: float) -> None:
        """Note an operation whose twin has another value although its arguments' twins have theirs."""
        error = _apart(found.linear, op.out)
        if not error <= limit:
            entered = [_apart(s.linear, op.value(tensor)) for _, tensor, s in op.dependents() if isinstance(s, Live)]
            if not op.in_place and all(e <= limit for e in entered):
                self.misuse(self.origin(op.name), error)

    def _derive(self, op: Operation) -> Result:
        handler = HANDLERS.get(op.name)
        if self.hold.ordinary and op.name not in _ORDINARY:
            return self._ordinary(op)
        result = op.held() if handler is None else handler(op)
        if self._held_parts and op.name == "split" and isinstance(result, list):
            which = self._held_parts.get(self._module())
            held = which(tuple(part.shape[-1] for part in op.out)) if which is not None else ()
            result = [op.held() if index in held else status for index, status in enumerate(result)]
        return result

    def _ordinary(self, op: Operation) -> Result:
        """Nothing held: the operation itself on the live tensors."""
        return op.wrap(op.again(lambda _slot: True, lambda _slot: False))

    def depends(self, values: Iterable[Any]) -> bool:
        """Whether any tensor among the values, or in their lists, depends on the input."""
        return any(
            self.status(value) is not None
            if isinstance(value, Tensor)
            else (isinstance(value, tuple | list) and self.depends(value))
            or (isinstance(value, Mapping) and self.depends(value.values()))
            for value in values
        )

    def _attach_all(self, out: Any, result: Result) -> None:
        if isinstance(out, Tensor):
            assert not isinstance(result, list)
            self.attach(out, result)
            return
        statuses = result if isinstance(result, list) else [result] * len(out)
        for item, status in zip(out, statuses, strict=True):
            if isinstance(item, Tensor) and item.is_floating_point():
                self.attach(item, status)

    def enter(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Make `x` an input: returns its twin on the linear path, a leaf (or `linear`, if it is given)."""
        self._entered = True  # what runs before has no linear path, and is as the model has it
        if linear is None:
            linear = x.detach().to(self.dtype).clone().requires_grad_(self.graph)
        with torch.set_grad_enabled(self.graph):
            self.attach(x, Live(linear.clone()))
        return linear

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For computing on the linear path itself."""
        self._paused = True
        try:
            with torch.set_grad_enabled(self.graph):
                yield
        finally:
            self._paused = False

    def hold_parts(self, module: nn.Module, which: HeldParts) -> None:
        """Where a module's own code splits a tensor, hold some of the parts."""
        self._held_parts[self._paths[id(module)]] = which

    def attach(self, tensor: Tensor, status: Status) -> None:
        """Say what is known of a tensor."""
        setattr(tensor, _MARK, (self, status))

    def status(self, value: Any) -> Status:
        """What is known of a tensor."""
        mode, status = getattr(value, _MARK, (None, None)) if isinstance(value, Tensor) else (None, None)
        return status if mode is self else None

    def live(self, tensor: Tensor) -> Tensor:
        """A tensor's twin on the linear path.

        A tensor that is a coefficient, or depends on the input by no operation that was seen, is noted in `misuses`,
        and counts as a constant.
        """
        status = self.status(tensor)
        if isinstance(status, Live):
            if status.broken is not None:
                self.misuse(status.broken.origin, status.broken.error)
            return status.linear
        self.misuse(status.origin if isinstance(status, Held) else Origin("model", UNSEEN, ""))
        return tensor.detach().to(self.dtype)

    def misuse(self, origin: Origin, error: float = 1.0) -> None:
        """Note a coefficient that is used as if it were live."""
        if all(origin != known.origin for known in self.misuses):
            self.misuses.append(Misuse(origin, error))

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Note a module that takes something live and gives something that no seen operation ties to it."""
        path = self._paths[id(module)]

        def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) and output else output
            if isinstance(out, Tensor) and out.is_floating_point() and self.status(out) is None:
                inside = any(known.origin.module.startswith(f"{path}.") for known in self.misuses)
                if (
                    not inside
                    and self.depends((*args, *kwargs.values()))
                    and next(module.parameters(), None) is not None
                ):
                    self.misuse(Origin(path, UNSEEN, "a fused kernel, compiled code, or not torch"))

        return module.register_forward_hook(left, with_kwargs=True)

    def constant(self, value: Tensor, original: Any, operation: str) -> Tensor:
        """A constant that is added to a live tensor; a leaf where constants are collected."""
        if not self.collect or not value.is_floating_point() or not bool(value.any()):
            return value
        known = self._names.get(id(original)) or self._looked_up(original)
        name = f"{self._module()}.{self._own_name(original) or operation}" if known is None else known[0]
        leaf = value.detach().nan_to_num().clone().requires_grad_()
        self.constants.append((name, leaf))
        return leaf

    def look_up(self, ids: Tensor, embeddings: nn.Module) -> list[RemovableHandle]:
        """Note what other tables than the input embeddings hold of the prompt's tokens `[1, T]`, for their names."""
        counted = torch.equal(ids[0], torch.arange(ids.shape[1], device=ids.device))  # such ids may be positions

        def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = args[0] if args else None
            if not isinstance(found, Tensor) or not isinstance(output, Tensor) or output.shape[:2] != ids.shape:
                return
            if found is ids or (not counted and torch.equal(found, ids.to(found))):
                self.lookups[output.untyped_storage().data_ptr()] = self._paths[id(module)], output

        tables = [m for m in self._modules.values() if isinstance(m, nn.Embedding) and m is not embeddings]
        return [table.register_forward_hook(left) for table in tables]

    def _looked_up(self, original: Any) -> tuple[str, Tensor] | None:
        return self.lookups.get(original.untyped_storage().data_ptr()) if isinstance(original, Tensor) else None

    def keep_probabilities(self, probs: Tensor) -> None:
        """Remember attention probabilities."""
        if self._keep is not None and probs.dim() in (3, 4):
            self.probabilities[self._module()] = self._keep(probs if probs.dim() == 4 else probs.unsqueeze(0))

    def origin(self, operation: str) -> Origin:
        """The place in the model that is running: the innermost module on the stack, and its line of code."""
        frame: Any = sys._getframe(1)
        line, path = "", ""
        while frame is not None and not (line and path):
            name = frame.f_code.co_filename
            if not line and not name.startswith(_NOT_THE_MODEL):
                line = f"{Path(name).name}:{frame.f_lineno}"
            path = path or self._paths.get(id(frame.f_locals.get("self")), "")
            frame = frame.f_back
        return Origin(path or "model", operation, line)

    def _own_name(self, original: Any) -> str | None:
        """The name of a parameter in the module that is running, which may have fetched it just now."""
        module = self._modules.get(self._module())
        own = () if module is None else module.named_parameters(recurse=False)
        return next((name for name, parameter in own if parameter is original), None)

    def _module(self) -> str:
        return self.origin("").module


def _random_states() -> list[bytes]:
    """The states of torch's generators on all devices."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return [bytes(state.numpy().data) for state in states]


def _has_floats(out: Any) -> bool:
    if isinstance(out, Tensor):
        return out.is_floating_point()
    return isinstance(out, tuple | list) and any(isinstance(o, Tensor) and o.is_floating_point() for o in out)


def _apart(linear: Tensor, stock: Tensor) -> float:
    wide = stock.detach().to(linear.dtype)
    return relative(linear.detach() - wide, wide)
