"""The torch mode that does every operation twice: as the model does it, and on the linear path.

From the linearised value of x, the handler of f (`loclin.freeze.table`) makes that of f(x). The model's own values are
never changed; tensors that depend on the input carry a status (`loclin.freeze.status`).
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

from loclin.common.sums import relative_error
from loclin.freeze.attention import unmixed
from loclin.freeze.linear import CASTS
from loclin.freeze.operation import Operation, Result, everywhere, nowhere
from loclin.freeze.options import FreezeOptions
from loclin.freeze.pattern import Pattern, WholePattern
from loclin.freeze.scores import ScoreRow
from loclin.freeze.status import Coefficient, Live, NonlinearUse, Origin, Status
from loclin.freeze.table import HANDLERS, is_in_place, plain_name
from loclin.freeze.widen import without_lowering

UNSEEN = "an operation that loclin cannot see"

Keep = Callable[[Pattern], Any]
"""Maps a module's attention pattern to what is remembered of it."""

FrozenParts = Callable[[tuple[int, ...]], tuple[int, ...]]
"""(the widths of the parts of a split) -> which of them are frozen."""

_NOT_THE_MODEL = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
"""Folders whose code is not the model's; with the separator, since torchao lies beside torch."""
_MARK = "_loclin_status"
_ORDINARY = CASTS | {"scaled_dot_product_attention"}
"""Operations with their usual handler for the ordinary Jacobian: casts keep the path's dtype."""


class Frozen(TorchFunctionMode):
    """The freezing context; made by `loclin.freeze.frozen`.

    Attributes
    ----------
    options, dtype: what is frozen, and the dtype of the linear path.
    probabilities: what `keep` returned for attention patterns, by module path.
    attention_bytes: the bytes up to which a pattern is made whole; None: always.
    constants: if constants are collected, (name, leaf) of each that was added to a live tensor.
    nonlinear_uses: coefficients that were used as if they were live: with any, the linear path is not the network.
    lookups: the rows of the prompt's tokens in tables other than the input embeddings: (the table's path, its output),
        by the address of the output's storage.
    graph, collect, soft_caps: build the linear path's graph; make constants leaves; treat tanh as a soft cap.
    takes_values: where no graph is built, the linearised value is the model's own, and is not computed again. It is the
        same up to rounding, if the linear path has the model's dtype.
    skips_mixing: attention gives zeros: what it gives is known, and only its pattern is wanted.
    see_mixing: None, or shown the values V and P V of every attention whose pattern is in blocks.
    scores: None, or where a row of attention scores is put (see `loclin.freeze.scores`).
    opaque: True while a module runs whose rule replaces its operations.
    audit: a relative error; operations whose linearised value is further from the model's own are nonlinear uses.
    noise: None, or a list to which operations are added that draw random numbers.
    """

    def __init__(
        self,
        paths: dict[nn.Module, str],
        options: FreezeOptions,
        dtype: torch.dtype,
        collect: bool,
        keep: Keep | None,
        attention_bytes: int | None,
    ) -> None:
        super().__init__()
        self.options, self.dtype = options, dtype
        self.probabilities: dict[str, Any] = {}
        self.attention_bytes = attention_bytes
        self.constants: list[tuple[str, Tensor]] = []
        self.nonlinear_uses: list[NonlinearUse] = []
        self.lookups: dict[int, tuple[str, Tensor]] = {}
        self.graph, self.collect, self.soft_caps = True, collect, False
        self.audit: float | None = None
        self.noise: list[Origin] | None = None
        self.see_mixing: Callable[[Tensor, Tensor], None] | None = None
        self.scores: ScoreRow | None = None
        self.opaque = self.takes_values = self.skips_mixing = False
        self._wide = options.precision == "double" and not options.ordinary
        self._keep, self._paused, self._entered = keep, False, False
        self._frozen_parts: dict[str, FrozenParts] = {}
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
        """Do the model's own call, and then the call on the linear path."""
        if self.noise is None:
            return self._do(func, args, kwargs or {})
        before = _random_states()
        out = self._do(func, args, kwargs or {})
        if _random_states() != before:
            self.noise.append(self.origin(plain_name(func)))
        return out

    def _do(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused or self.opaque:
            return func(*args, **kwargs)
        first = args[0] if args and self._wide and self._entered else None
        # weights and what depends on the input; tables of rotations stay in the model's dtype
        if isinstance(first, nn.Parameter) or self.status(first) is not None:
            func, args, kwargs = without_lowering(func, plain_name(func), args, kwargs)
        if not self.depends((*args, *kwargs.values())):
            return func(*args, **kwargs)
        in_place = is_in_place(func, args, kwargs)
        before = args[0].detach().clone() if in_place else None
        with torch.no_grad():
            skipped = self.skips_mixing and plain_name(func) == "scaled_dot_product_attention"
            out = (unmixed if skipped else func)(*args, **kwargs)
        result = args[0] if in_place else out
        if _has_floats(result):
            op = Operation(self, plain_name(func), func, args, kwargs, in_place, before, result)
            with torch.set_grad_enabled(self.graph):
                found = self._derive(op)
                self._attach_all(result, found)
            if self.audit is not None and isinstance(found, Live):
                self._examine(op, found, self.audit)
        return out

    def _examine(self, op: Operation, found: Live, limit: float) -> None:
        """Note an operation whose linearised value is wrong although those of its arguments are right."""
        error = _error(found.linear, op.out)
        if not error <= limit:
            entered = [_error(s.linear, op.value(tensor)) for _, tensor, s in op.dependents() if isinstance(s, Live)]
            if not op.in_place and all(e <= limit for e in entered):
                self.note_nonlinear_use(self.origin(op.name), error)

    def _derive(self, op: Operation) -> Result:
        handler = HANDLERS.get(op.name)
        if self.options.ordinary and op.name not in _ORDINARY:  # nothing frozen: the operation itself
            return op.wrap(op.recompute(everywhere, nowhere))
        result = op.coefficient() if handler is None else handler(op)
        if self._frozen_parts and op.name == "split" and isinstance(result, list):
            which = self._frozen_parts.get(self._module())
            frozen = which(tuple(part.shape[-1] for part in op.out)) if which is not None else ()
            result = [op.coefficient() if index in frozen else status for index, status in enumerate(result)]
        return result

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
        """Make `x` an input; returns its linearised value, a leaf (or `linear`, if given)."""
        self._entered = True  # before this there is no linear path, and nothing is widened
        if linear is None:
            linear = x.detach().to(self.dtype).clone().requires_grad_(self.graph)
        with torch.set_grad_enabled(self.graph):
            self.attach(x, Live(linear.clone()))
        return linear

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute on the linear path itself, without interception."""
        self._paused = True
        try:
            with torch.set_grad_enabled(self.graph):
                yield
        finally:
            self._paused = False

    def freeze_parts(self, module: nn.Module, which: FrozenParts) -> None:
        """Freeze some of the parts where a module's own code splits a tensor."""
        self._frozen_parts[self._paths[id(module)]] = which

    def attach(self, tensor: Tensor, status: Status) -> None:
        """Set a tensor's status."""
        setattr(tensor, _MARK, (self, status))

    def status(self, value: Any) -> Status:
        """A tensor's status."""
        mode, status = getattr(value, _MARK, (None, None)) if isinstance(value, Tensor) else (None, None)
        return status if mode is self else None

    def live(self, tensor: Tensor) -> Tensor:
        """A tensor's linearised value.

        A tensor that is a coefficient, or that depends on the input by no operation that was seen, is added to
        `nonlinear_uses` and counts as a constant.
        """
        status = self.status(tensor)
        if isinstance(status, Live):
            if status.nonlinear is not None:
                self.note_nonlinear_use(status.nonlinear.origin, status.nonlinear.error)
            return status.linear
        self.note_nonlinear_use(status.origin if isinstance(status, Coefficient) else Origin("model", UNSEEN, ""))
        return tensor.detach().to(self.dtype)

    def note_nonlinear_use(self, origin: Origin, error: float = 1.0) -> None:
        """Note a coefficient that is used as if it were live; once for each origin."""
        if all(origin != known.origin for known in self.nonlinear_uses):
            self.nonlinear_uses.append(NonlinearUse(origin, error))

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Note a module with a live input whose output depends on it by no operation that is seen."""
        path = self._paths[id(module)]

        def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(out, Tensor) or not out.is_floating_point() or self.status(out) is not None:
                return
            inside = any(known.origin.module.startswith(f"{path}.") for known in self.nonlinear_uses)
            has_weights = next(module.parameters(), None) is not None
            live = not inside and has_weights and self.depends((*args, *kwargs.values()))
            if live and not self._ignores(module, args, kwargs, out):
                self.note_nonlinear_use(Origin(path, UNSEEN, "a fused kernel, compiled code, or not torch"))

        return module.register_forward_hook(left, with_kwargs=True)

    def _ignores(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Whether a module gives the same for other numbers: it takes a shape from its input, such as positions."""

        def other(value: Any) -> Any:
            return value if self.status(value) is None else 1 - 2 * value

        given = (*args, *kwargs.values())
        with self.paused():
            if self.depends(value for value in given if not isinstance(value, Tensor)):
                return False
            again = module.forward(*map(other, args), **{name: other(value) for name, value in kwargs.items()})
        again = again[0] if isinstance(again, tuple) else again
        return isinstance(again, Tensor) and torch.equal(again, out)

    def constant(self, value: Tensor, original: Any, operation: str) -> Tensor:
        """A constant that is added to a live tensor; a leaf, if constants are collected."""
        if not self.collect or not value.is_floating_point() or not bool(value.any()):
            return value
        known = self._names.get(id(original)) or self._looked_up(original)
        name = f"{self._module()}.{self._own_name(original) or operation}" if known is None else known[0]
        leaf = value.detach().nan_to_num().clone().requires_grad_()
        self.constants.append((name, leaf))
        return leaf

    def look_up(self, ids: Tensor, embeddings: nn.Module) -> list[RemovableHandle]:
        """Note the rows of the prompt's tokens `[1, T]` in tables other than the input embeddings, for their names."""
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
            self.keep_pattern(WholePattern(probs.flatten(0, -3)))

    def keep_pattern(self, pattern: Pattern) -> None:
        """Remember an attention pattern."""
        if self._keep is not None:
            self.probabilities[self._module()] = self._keep(pattern)

    def repeats(self, out: Any) -> bool:
        """Whether an operation's linearised value need not be computed, see `takes_values`."""
        if not self.takes_values or self.graph or self.audit is not None or self.options.ordinary:
            return False
        tensors = out if isinstance(out, tuple | list) else [out]
        return all(t.dtype == self.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point())

    def origin(self, operation: str) -> Origin:
        """The innermost module on the stack, and its line of code."""
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
        """The name of a parameter in the running module, which may have loaded it just now."""
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


def _error(linear: Tensor, stock: Tensor) -> float:
    wide = stock.detach().to(linear.dtype)
    return relative_error(linear.detach() - wide, wide)
