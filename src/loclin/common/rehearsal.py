"""Runs code on tensors that have shapes and no numbers, and counts what it would cost: flops, memory, seconds.

Every operation runs on the meta device, while each tensor says of itself that it is on the processor: so code takes the
way that it takes there. Where it asks for a number, it gets one so small that no sum of such numbers counts. Nothing is
NaN, comparisons of all numbers hold.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

_CPU, _META = torch.device("cpu"), torch.device("meta")
_TINY = 1e-320
_CALL_SECONDS = 1e-5  # of an operation beside its arithmetic: Python, and the call
_LAPACK = 0.3  # the speed of a decomposition relative to that of a large product
_DECOMPOSITIONS = {
    "aten::_linalg_svd": 20.0,
    "aten::linalg_svdvals": 6.0,
    "aten::linalg_qr": 4.0,
    "aten::linalg_eigh": 12.0,
    "aten::_linalg_eigh": 12.0,
}
"""Flops over n m^2 of an [n, m] matrix, m <= n; they count for the time, `flops` are those of products."""
_KEEP_ZERO = ("clone", "detach", "alias", "_to_copy", "gelu", "silu", "relu", "tanh", "neg")
_HOLD = ("le", "lt", "ge", "gt", "isfinite")
_FLAGS: dict[str, Callable[[list[bool]], bool]] = {
    **dict.fromkeys(("bitwise_and", "logical_and", "__and__", "mul"), all),
    **dict.fromkeys(("bitwise_or", "logical_or", "__or__"), any),
    **dict.fromkeys(("bitwise_not", "logical_not"), lambda flags: not flags[0]),
}
"""Operations on flags, and what they give of the flags that they take."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes
    ----------
    flops: floating-point operations of large matrix products.
    memory: bytes that are read from memory, or written.
    read: bytes that are read from disk.
    """

    flops: float
    memory: float
    read: float


@dataclass(frozen=True)
class Cost:
    """What some code costs.

    Attributes
    ----------
    flops: of matrix products.
    algebra: the flops of products that take as long as the decompositions.
    moved: bytes that operations read from memory and write to it.
    calls: how many operations there are.
    peak, kept: bytes held at most, and when the code has ended, beside those held before.
    """

    flops: int | float = 0
    algebra: int | float = 0
    moved: int | float = 0
    calls: int | float = 0
    peak: int | float = 0
    kept: int | float = 0

    def seconds(self, rates: Rates) -> float:
        """How long it takes: products, memory and calls one after the other."""
        return (self.flops + self.algebra) / rates.flops + self.moved / rates.memory + self.calls * _CALL_SECONDS

    def then(self, other: Cost) -> Cost:
        """The cost of one piece of code and another behind it, while what the first one keeps is held."""
        peak = max(self.peak, self.kept + other.peak)
        added = (x + y for x, y in zip(astuple(self), astuple(other), strict=True))
        return replace(Cost(*added), peak=peak)

    def towards(self, other: Cost, ratio: float) -> Cost:
        """The point on the straight line through two costs: itself at 0, the other at 1.

        What is held for a while, beside what is kept, is that of the larger one.
        """
        point = Cost(*(x + ratio * (y - x) for x, y in zip(astuple(self), astuple(other), strict=True)))
        return replace(point, peak=point.kept + max(self.peak - self.kept, other.peak - other.kept))


class Rehearsal(TorchDispatchMode):
    """Counts while it is entered by `rehearse`; memory is that of all tensors but the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._random = np.random.default_rng(0)
        self._held = 0
        self._known = weakref.WeakSet(weight.untyped_storage() for weight in weights)
        self._truths = WeakTensorKeyDictionary()
        self._counted = Cost()

    def cost(self, work: Callable[[], object]) -> Cost:
        """What a call costs; what it returns is held until its memory has been counted."""
        gc.collect()  # or else what earlier code left would be freed meanwhile
        before, self._counted = self._held, Cost(peak=self._held)
        result = work()
        counted, kept = self._counted, self._held - before
        del result
        return replace(counted, peak=counted.peak - before, kept=kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the meta device, and count it."""
        with torch._C.DisableTorchFunction():  # here tensors say where they are
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name
        tensors = list(_tensors_in((*args, *kwargs.values())))
        if tensors and not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)  # a few numbers that code has made itself, such as token ids
        if name == "aten::equal":
            return True
        if name == "aten::_local_scalar_dense":
            return self.numbers(args[0]).item()
        args, kwargs = _without_numbers(args), {key: _without_numbers(value) for key, value in kwargs.items()}
        if not tensors and any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"], kwargs["pin_memory"] = _META, False
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self._truths[out] = self._is_true(name.removeprefix("aten::").rstrip("_"), tensors)
        elif isinstance(out, Tensor):
            self._note_zero(name.removeprefix("aten::"), tensors, out)
        self._count(func, args, kwargs, out, tensors)
        return out

    def _is_true(self, name: str, tensors: list[Tensor]) -> bool:
        """What is assumed of the flags that an operation gives: numbers are in order, and not zero."""
        flags = [self._truths.get(tensor, False) for tensor in tensors if tensor.dtype == torch.bool]
        if name in _FLAGS:
            return bool(flags) and _FLAGS[name](flags)
        if name in ("eq", "ne"):  # a number is equal to itself alone
            return (len(tensors) == 2 and tensors[0] is tensors[1]) == (name == "eq")
        if name == "any" and not flags:
            return self._truths.get(tensors[0], True)
        return name in _HOLD or (name == "all" and not flags) or flags[:1] == [True]

    def _note_zero(self, name: str, tensors: list[Tensor], out: Tensor) -> None:
        """Note a tensor that is zero, whatever the numbers are, and forget one that is written to."""
        zeros = [self._truths.get(tensor, True) is False for tensor in tensors]
        above = name == "triu" and out.dim() > 2  # what a token attends to behind itself
        made = name in ("zeros", "zeros_like", "new_zeros", "zero_") or (name in _KEEP_ZERO and zeros[0])
        if made or above or (name == "mul" and any(zeros)):
            self._truths[out] = False
        else:
            self._truths.pop(out, None)

    def numbers(self, tensor: Tensor) -> Any:
        """The numbers of a tensor for code that asks for them: tiny and descending, zeros where they are whole.

        So singular values, and the bounds on them, are well apart. A little is random: no two numbers are equal.
        """
        if tensor.is_floating_point():
            steps = np.arange(tensor.shape[-1] if tensor.dim() else 1, 0, -1)
            return (steps + 0.1 * self._random.random(tuple(tensor.shape))) / len(steps) * _TINY
        if tensor.dtype == torch.bool:
            return np.full(tuple(tensor.shape), self._truths.get(tensor, False))
        return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        made = list(_tensors_in((out,)))
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        counted = replace(self._counted, peak=max(self._counted.peak, self._held))
        if not func.is_view and tensors:
            flops, algebra, name = 0, 0.0, func._schema.name
            if func.overloadpacket in flop_registry:
                flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            elif name in _DECOMPOSITIONS:
                *batch, n, m = tensors[0].shape
                algebra = _DECOMPOSITIONS[name] * prod(batch) * max(n, m) * min(n, m) ** 2 / _LAPACK
            moved = sum(tensor.numel() * tensor.itemsize for tensor in (*tensors, *made))
            counted = replace(
                counted,
                flops=counted.flops + flops,
                algebra=counted.algebra + algebra,
                moved=counted.moved + moved,
                calls=counted.calls + 1,
            )
        self._counted = counted

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention as one operation, which holds no probabilities."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        flops = 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        moved = sum(tensor.numel() * tensor.itemsize for tensor in (query, key, value, out))
        self._counted = replace(self._counted, flops=self._counted.flops + flops, moved=self._counted.moved + moved)
        return out

    def _free(self, nbytes: int) -> None:
        self._held -= nbytes


_SAID = {
    torch.Tensor.device.__get__: _CPU,
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}


class _Disguise(TorchFunctionMode):
    """Lets tensors on the meta device say that they are on the processor, and gives Python their numbers."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAID:
            return _SAID[func]
        if func is torch.Tensor.data_ptr:
            tensor = args[0]
            return (tensor.untyped_storage()._cdata << 48) + tensor.storage_offset() * tensor.element_size()
        if func is scaled_dot_product_attention and not any(tensor.requires_grad for tensor in args[:3]):
            return self._rehearsal.attend(*args[:3])  # on the meta device it would be made of products
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].is_meta:
            numbers = self._rehearsal.numbers(args[0])
            return numbers.tolist() if func is torch.Tensor.tolist else numbers
        return func(*args, **(kwargs or {}))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which may be lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _without_numbers(value: Any) -> Any:
    """An argument of an operation for the meta device."""
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, list):
        return [_without_numbers(one) for one in value]
    if isinstance(value, tuple):
        return tuple(map(_without_numbers, value))
    return _META if isinstance(value, torch.device) else None if isinstance(value, torch.Generator) else value


@contextmanager
def rehearse(weights: Iterable[Tensor]) -> Iterator[Rehearsal]:
    """Rehearse what runs inside, on weights on the meta device; in the calling thread, the only one that torch uses."""
    rehearsal, config = Rehearsal(weights), cast("Any", _config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _Disguise(rehearsal), rehearsal, config.patch(meta_nonzero_assume_all_nonzero=True):
            yield rehearsal
    finally:
        torch.set_num_threads(threads)
