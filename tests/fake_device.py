"""A device without hardware: it computes on the processor, and refuses what a GPU refuses.

Its tensors say that they are on `fake:0`. An operation that mixes them with tensors on the processor fails as on CUDA,
and so do `numpy()` and a generator of another device. What would make a processor wait for a GPU is counted in `waits`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "fake"
_CPU = torch.device("cpu")
_LOCLIN = f"{Path('src') / 'loclin'}"
_MAY_MIX = {"_to_copy", "copy_"}
_WAITS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "_linalg_check_errors"),
}
_INDEXING = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}

waits: Counter[str] = Counter()
"""How often each line of loclin has waited for the device: for a number, or a copy on the processor."""


class OnFake(Tensor):
    """A tensor on the fake device; `raw` has its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnFake:
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="fake:0"
        )
        made.raw = raw
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {DEVICE}"

    def __format__(self, form: str) -> str:
        return self.detach().cpu().__format__(form)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the processor, and put its results where a GPU would have them."""
    name = func._schema.name.partition("::")[2]
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    if name not in _MAY_MIX:
        _refuse(func, name, args, kwargs, given)
    if _makes_wait(name, args, kwargs):
        waits[f"{_line()}: {name}"] += 1
    wrappers = {id(one.raw): one for one in given if isinstance(one, OnFake)}
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    if kwargs.get("device") == _CPU or not (wrappers or _is_fake(kwargs.get("device"))):
        return out
    if name == "copy_" and not isinstance(args[0], OnFake):
        return args[0]

    def place(found: Any) -> Any:
        if not isinstance(found, Tensor):
            return found
        known = wrappers.get(id(found))
        assert known is None or known.shape == found.shape, f"{name} changes a tensor's shape in place"
        return OnFake(found) if known is None else known

    return tree_map(place, out)


def _bare(value: Any) -> Any:
    if isinstance(value, OnFake):
        return value.raw
    return _CPU if _is_fake(value) else value


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == DEVICE


def _refuse(func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
    """Fail where CUDA fails: tensors of two devices, but for numbers and indices; integer products; generators."""
    if name in _INDEXING:  # indices may be on the processor
        given = [one for one in (args[0], *args[2:]) if isinstance(one, Tensor)]
    elsewhere = [one for one in given if not isinstance(one, OnFake)]
    written = [one for one, told in zip(args, func._schema.arguments, strict=False) if told.is_write]
    if len(elsewhere) < len(given) and any(one.dim() or any(one is out for out in written) for one in elsewhere):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device: fake:0 and cpu")
    if name in ("mm", "bmm", "addmm", "baddbmm") and not given[0].is_floating_point() and not given[0].is_complex():
        raise RuntimeError(f'"{name}" not implemented for {given[0].dtype}')
    generator = kwargs.get("generator")
    if generator is not None and generator.device == _CPU and (len(elsewhere) < len(given) or not given):
        raise RuntimeError("Expected a 'fake' device type for generator but found 'cpu'")


def _makes_wait(name: str, args: Any, kwargs: Any) -> bool:
    if name in _INDEXING:
        indices = [one for one in args[1] if one is not None]
        return any(not isinstance(one, OnFake) or one.dtype == torch.bool for one in indices)
    if name == "_to_copy":
        return isinstance(args[0], OnFake) and kwargs.get("device") == _CPU
    if name == "copy_":
        return isinstance(args[1], OnFake) and not isinstance(args[0], OnFake)
    return name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _line() -> str:
    """The line of loclin that is running, or that of whoever calls torch."""
    frame = sys._getframe(1)
    while frame is not None and _LOCLIN not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{frame.f_code.co_filename.partition(_LOCLIN)[2][1:]}:{frame.f_lineno} {frame.f_code.co_name}"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the waits of what runs inside."""
    before, found = waits.copy(), Counter[str]()
    yield found
    found.update(waits - before)


def install() -> None:
    """Register the device, for the whole process: torch forgets no device."""
    from loclin.freeze import quantised

    quantised.PLAIN = (*quantised.PLAIN, OnFake)
    _setup_privateuseone_for_python_backend(DEVICE)
    for name in _MADE:
        operation = attrgetter(name)(torch.ops.aten)
        _LIBRARY.impl(operation, partial(_run, operation), "PrivateUse1")


_MADE = (
    *("empty.memory_format", "empty_strided.default", "eye.default", "eye.m", "arange.default", "arange.start"),
    *("arange.start_step", "linspace.default", "randperm.default", "copy_.default"),
)
"""Operations that make tensors, which no tensor tells where; and the copy into one that torch itself makes."""
_LIBRARY = torch.library.Library("aten", "IMPL")
