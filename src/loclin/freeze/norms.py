"""Norms: 1/rms and 1/std are held, the input (centred for LayerNorm) stays live. Paper, equations 4 to 6."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.freeze.hold import Hold, with_value_of

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_GAIN_OFFSET = {"Gemma3RMSNorm": 1.0}
"""Families whose gain is an offset plus the stored weight."""


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is a root-mean-square norm, by its class's name."""
    return type(module).__name__.endswith("RMSNorm")


def _accumulation_dtype(x: Tensor, hold: Hold) -> torch.dtype:
    return x.dtype if hold.precision == "double" else torch.promote_types(x.dtype, torch.float32)


def rms_norm(module: nn.Module, x: Tensor, orig: Tensor, hold: Hold) -> Tensor:
    """The frozen RMSNorm: x times a held coefficient per position and channel."""
    dtype = _accumulation_dtype(x, hold)
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), 0.0)
    held = x.detach().to(dtype)
    coefficient = torch.rsqrt(held.square().mean(-1, keepdim=True) + eps)
    weight = getattr(module, "weight", None)
    if weight is not None:
        coefficient = coefficient * (_GAIN_OFFSET.get(type(module).__name__, 0.0) + weight.detach().to(dtype))
    return (x.to(dtype) * coefficient).to(orig.dtype)


def layer_norm(module: nn.Module, x: Tensor, orig: Tensor, hold: Hold) -> Tensor:
    """The frozen LayerNorm: the centred x times a held coefficient, plus its bias."""
    assert isinstance(module, nn.LayerNorm)
    dtype = _accumulation_dtype(x, hold)
    live = x.to(dtype)
    centred = live - live.mean(-1, keepdim=True)
    coefficient = torch.rsqrt(centred.detach().square().mean(-1, keepdim=True) + module.eps)
    if module.weight is not None:
        coefficient = coefficient * module.weight.detach().to(dtype)
    lin = centred * coefficient
    if module.bias is not None:
        lin = lin + module.bias.to(dtype)
    return lin.to(orig.dtype)


def hold_rms_norm(module: nn.Module, path: str, hold: Hold) -> list[RemovableHandle]:
    """Freeze a root-mean-square norm."""
    return _hold(module, path, hold, rms_norm)


def hold_layer_norm(module: nn.Module, path: str, hold: Hold) -> list[RemovableHandle]:
    """Freeze a LayerNorm."""
    return _hold(module, path, hold, layer_norm)


def _hold(
    module: nn.Module, path: str, hold: Hold, form: Callable[[nn.Module, Tensor, Tensor, Hold], Tensor]
) -> list[RemovableHandle]:
    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return with_value_of(output, form(module, args[0], output, hold), hold, path)

    return [module.register_forward_hook(replace)]
