"""A replica of a model: new module objects that share the model's weights.

Hooks and flags on a replica do not affect the model, its training or other threads, nor those on the model the replica.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.jit import ScriptModule

from loclin.models.lease import empty_layers

M = TypeVar("M", bound=nn.Module)

_LOCK = "_loclin_lock"
_COMPILED_FROM = "_torchdynamo_orig_callable"
CHANGE_THEIR_WEIGHTS = ("RwkvModel",)
"""Models that change their weights in a forward pass: here, division by powers of two."""
_POSITIONS = "rope_deltas"
"""What some models remember of the images of the prompt before, and take where they see no token ids."""
_PLAIN = (bool, int, float, str, torch.Tensor)


def replicate(root: M) -> M:
    """Copy the modules, in evaluation mode: parameters and buffers are shared, everything else is new.

    Attributes that refer to other modules, such as the `forward` that accelerate puts on a module, refer to the copies.
    Compiled code is replaced by its source. Cost: milliseconds; no weight is read or copied.
    """
    compiled = {id(module): module._modules["_orig_mod"] for module in root.modules() if "_orig_mod" in module._modules}
    own = [module for module in root.modules() if id(module) not in compiled and not isinstance(module, ScriptModule)]
    new: dict[int, Any] = {id(module): type(module).__new__(type(module)) for module in own}
    new |= {outer: new.get(id(inner), inner) for outer, inner in compiled.items()}
    lock = threading.RLock()
    for module in own:
        attributes = {name: _renew(value, new) for name, value in vars(module).items()}
        vars(new[id(module)]).update(attributes, training=False, _compiled_call_impl=None, **{_LOCK: lock})
        if _POSITIONS in attributes:
            vars(new[id(module)])[_POSITIONS] = None
    for module in own:
        if type(module).__name__ in CHANGE_THEIR_WEIGHTS:
            copy_weights(new[id(module)])
    empty_layers(new[id(root)])
    return new[id(root)]


def copy_weights(root: nn.Module, device: torch.device | None = None) -> None:
    """Copy a replica's weights and buffers, to a device if one is given, so that it no longer shares them."""
    for module in root.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                copied = weight.detach().to(device, copy=True)
                module._parameters[name] = nn.Parameter(copied, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device, copy=True)


def _renew(value: Any, new: dict[int, Any]) -> Any:
    """An attribute's value with the modules that it refers to replaced; containers are copied."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, FunctionType):
        written = getattr(value, _COMPILED_FROM, None)
        return value if written is None else _renew(written, new)
    if isinstance(value, MethodType):
        owner = _renew(value.__self__, new)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        kwargs = {name: _renew(item, new) for name, item in value.keywords.items()}
        again = functools.partial(_renew(value.func, new), *(_renew(item, new) for item in value.args), **kwargs)
        vars(again).update({name: _renew(item, new) for name, item in vars(value).items()})
        return again
    if type(value) is tuple:
        return tuple(_renew(item, new) for item in value)
    if type(value) not in (list, dict, set, OrderedDict):
        return value
    again = new[id(value)] = copy.copy(value)
    if isinstance(again, dict):
        for key, item in value.items():
            again[key] = _renew(item, new)
    elif isinstance(again, list):
        again[:] = [_renew(item, new) for item in value]
    return again


@contextmanager
def exclusive(module: nn.Module) -> Iterator[None]:
    """Let only one thread at a time put hooks on a replica and run it; other modules have no lock."""
    with vars(module).get(_LOCK, threading.RLock()):
        yield
