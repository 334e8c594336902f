"""Linear layers with quantised weights: their kernels hide the operations, but the weights can be read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loclin.models.four_bit import PACKING
from loclin.models.lease import OnDisk

_LIBRARIES = ("torchao", "optimum")
"""Libraries whose tensors represent a float weight, and have `dequantize()`."""
_STORED = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_PACKED = ("qweight", "weight_packed", "W_q")
"""Names of weights that are stored in another shape."""
_BY_INPUT = ("act_quant_kwargs", "activation_qtype", "input_quant_func")
"""Attributes, of the tensor or the module, that say that the input is rounded too: the module is then not affine."""
PLAIN: tuple[type[Tensor], ...] = (Tensor, nn.Parameter, OnDisk)
"""Classes of weights that are their own numbers."""


def dense_weight(module: nn.Module) -> Tensor | None:
    """A linear layer's weight `[out, in]`, itself or dequantised at each call; None for an unknown kind of layer."""
    if not has_dense_weight(module):
        return None
    weight: Any = module.weight
    return _dequantised(weight.detach(), weight) if is_quantised(module) else weight.detach()


def has_dense_weight(module: nn.Module) -> bool:
    """Whether `dense_weight` returns one. Free."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or (weight.is_meta and not isinstance(weight, OnDisk)):
        return False
    plain = type(module) is nn.Linear and type(weight) in PLAIN
    return is_quantised(module) or (plain and weight.is_floating_point())


def is_quantised(module: nn.Module, _path: str = "") -> bool:
    """Whether a module is a linear layer with a quantised weight that `dense_weight` can read."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or _rounds_input(module, weight):
        return False
    return _is_four_bit(weight) or (is_traceable_wrapper_subclass(weight) and _home(weight) in _LIBRARIES)


def is_unreadable(module: nn.Module, _path: str = "") -> bool:
    """Whether a module's own weights are quantised in a way that `dense_weight` cannot read."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return not is_quantised(module) and any(
        name in _PACKED
        or (tensor.dtype in _STORED and tensor.dim() > 1)
        or (is_traceable_wrapper_subclass(tensor) and not isinstance(module, nn.Embedding))
        for name, tensor in own
    )


def why_unreadable(module: nn.Module) -> str:
    """Why a module's quantised weights cannot be used."""
    weight = getattr(module, "weight", None)
    if _rounds_input(module, weight) or type(module).__name__ == "Linear8bitLt":
        return "it rounds its input as well as its weight, so that it is no affine map of its input"
    return "loclin does not know how its weight is stored"


def compute_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer computes, if it is coarser than that of its output; else the output's."""
    found = torch.bfloat16 if packs(module) else getattr(module, "compute_dtype", None)
    coarser = isinstance(found, torch.dtype) and torch.finfo(found).eps > torch.finfo(dtype).eps
    return found if coarser and isinstance(found, torch.dtype) else dtype


def packs(module: nn.Module) -> bool:
    """Whether bitsandbytes uses its bfloat16 kernel for a layer, as on some CPUs, whatever `compute_dtype` says."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not _is_four_bit(weight) or weight.device.type != "cpu":
        return False
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    return bool(packed or getattr(module, PACKING, False))


def _is_four_bit(weight: Tensor) -> bool:
    return type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None


def _rounds_input(module: nn.Module, weight: Any) -> bool:
    return any(getattr(thing, name, None) is not None for thing in (module, weight) for name in _BY_INPUT)


def _home(weight: Tensor) -> str:
    return type(weight).__module__.partition(".")[0]


def _dequantised(data: Tensor, weight: Tensor) -> Tensor:
    if not _is_four_bit(weight):
        return data.dequantize()
    import bitsandbytes.functional as bnb

    state: Any = getattr(weight, "quant_state")  # noqa: B009 (a tensor's class is not known to have it)
    if getattr(state, "packing_format_for_cpu", False):
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return bnb.dequantize_4bit(data.as_subclass(Tensor), state)
