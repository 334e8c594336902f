"""The precision rule of float64 linear paths (`precision="double"`): casts to a lower dtype are left out.

Models cast norms, softmax, routers and rotations to float32 in their own code. So rounded, they limit J x to 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loclin.freeze.products import FACTORS

_CASTS = ("float", "half", "bfloat16")


def _lowers(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value != torch.float64


def _wide(value: Any) -> Any:
    lower = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.double() if lower else value


def without_lowering(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The same call without its cast of a float64 tensor to a lower dtype."""
    if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
        return func, args, kwargs
    if name in FACTORS:  # a weight in float32, for an input that would have been cast to it
        return func, tuple(_wide(value) for value in args), {key: _wide(value) for key, value in kwargs.items()}
    if name in _CASTS:
        return Tensor.to, (args[0], torch.float64), {}
    if name == "type_as" and isinstance(args[1], Tensor) and _lowers(args[1].dtype):
        return Tensor.to, (args[0], args[1].device), {}
    args = tuple(torch.float64 if _lowers(value) else value for value in args)
    kwargs = {key: torch.float64 if _lowers(value) else value for key, value in kwargs.items()}
    if name == "to" and len(args) > 1 and isinstance(args[1], Tensor) and _lowers(args[1].dtype):
        args = (args[0], args[1].device, *args[2:])
    return func, args, kwargs
