"""Dataclasses to plain JSON values, and back with msgspec, which checks types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from loclin.errors import ResultError

T = TypeVar("T")

TENSORS_ONLY = {"saved": "tensors"}
"""Metadata of a field that is too large for JSON, and is saved in `.safetensors` files only."""
NOT_SAVED = {"saved": "never"}
"""Metadata of a field that belongs to a model in memory, and is never saved."""


def to_plain(value: Any, store: Callable[[str, Tensor], Any] | None = None, name: str = "") -> Any:
    """Convert dataclasses, lists, tuples, mappings, tensors and plain values, in any nesting, to plain JSON values.

    Numbers that are not finite become texts. `store` takes each tensor with its name (`field.field`) and returns a
    plain value for it; without it, a tensor becomes its dtype, its shape and its numbers, and a dataclass has also the
    properties that its `derived` names, for readers. `name` is the name of `value` itself.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _to_lists(value) if store is None else store(name, value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, store, _join(name, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, store, _join(name, str(i))) for i, item in enumerate(value)]
    if not is_dataclass(value):
        raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")
    kept = (None,) if store is None else (None, "tensors")
    wanted = [field.name for field in fields(value) if field.metadata.get("saved") in kept]
    if store is None:
        wanted += getattr(value, "derived", ())
    return {field: to_plain(getattr(value, field), store, _join(name, field)) for field in wanted}


def from_plain(values: Any, kind: type[T], tensors: Mapping[str, Tensor] | None = None) -> T:
    """Build a dataclass from what `to_plain` returned, but for unknown keys; ResultError says which field is wrong."""

    def read(wanted: type, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError(f"Expected {wanted.__name__}, got {type(given).__name__}")
        if "tensor" in given:
            return (tensors or {})[given["tensor"]]
        dtype = getattr(torch, given["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"Unknown dtype {given['dtype']!r}")
        return torch.tensor(_to_floats(given["values"]), dtype=dtype).reshape(given["shape"])

    try:
        return msgspec.convert(values, kind, dec_hook=read, strict=False)
    except (msgspec.ValidationError, KeyError, RuntimeError) as error:
        why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ResultError(why) from error


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _to_lists(value: Tensor) -> dict[str, Any]:
    """Convert a tensor to nested lists; every float of every dtype is exact in decimal."""
    values = value.tolist() if value.isfinite().all() else to_plain(value.tolist())
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": values}


def _to_floats(values: Any) -> Any:
    """Convert texts in nested lists back to numbers that are not finite."""
    if isinstance(values, list):
        return [_to_floats(value) for value in values]
    return float(values) if isinstance(values, str) else values
