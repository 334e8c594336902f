"""Norms: x / rms(x) and (x - mean(x)) / std(x), with 1/rms and 1/std frozen (paper, equations 4 to 6).

Those that a model computes step by step need no rule: their square roots are frozen like any other coefficient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from loclin.freeze.operation import Operation, Result
from loclin.freeze.status import Live

Form = Callable[[Operation, Tensor, Live], Live]
"""(the call, its input, the input's status) -> the output's status."""


def _of_live(form: Form) -> Callable[[Operation], Result]:
    """A handler for a norm: its form if the input is live; a norm of a coefficient is a coefficient."""

    @wraps(form)
    def handler(op: Operation) -> Result:
        x = op.get(0, "input")
        status = op.status(x)
        return form(op, x, status) if isinstance(status, Live) else status

    return handler


def _wide(op: Operation, x: Tensor) -> Tensor:
    """The input in float32 or wider, the dtype of norms."""
    return op.value(x).detach().to(torch.promote_types(op.context.dtype, torch.float32))


def _scaled(
    op: Operation, status: Live, centred: Tensor, coefficient: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Live:
    if weight is not None:
        coefficient = coefficient * weight.detach().to(coefficient.dtype)
    linear = centred * coefficient.to(centred.dtype)
    if bias is not None:
        linear = linear + op.context.constant(op.cast(bias), bias, op.name)
    return status.then(linear)


@_of_live
def rms_norm(op: Operation, x: Tensor, status: Live) -> Live:
    """`F.rms_norm`: x times a frozen coefficient."""
    shape, weight, eps = op.get(1, "normalized_shape"), op.get(2, "weight"), op.get(3, "eps")
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    coefficient = torch.rsqrt(_wide(op, x).square().mean(dims, keepdim=True) + eps)
    return _scaled(op, status, status.linear, coefficient, weight, None)


@_of_live
def layer_norm(op: Operation, x: Tensor, status: Live) -> Live:
    """`F.layer_norm`: the centred x times a frozen coefficient, plus its bias."""
    shape, weight, bias = op.get(1, "normalized_shape"), op.get(2, "weight"), op.get(3, "bias")
    dims = tuple(range(-len(shape), 0))
    variance = _wide(op, x).var(dims, unbiased=False, keepdim=True)
    centred = status.linear - status.linear.mean(dims, keepdim=True)
    return _scaled(op, status, centred, torch.rsqrt(variance + op.get(4, "eps", 1e-5)), weight, bias)


@_of_live
def group_norm(op: Operation, x: Tensor, status: Live) -> Live:
    """`F.group_norm`: a LayerNorm of each group of channels."""
    groups, weight, bias, eps = op.get(1, "num_groups"), op.get(2, "weight"), op.get(3, "bias"), op.get(4, "eps", 1e-5)
    grouped = status.linear.reshape(x.shape[0], groups, -1)
    centred = (grouped - grouped.mean(-1, keepdim=True)).view(x.shape)
    variance = _wide(op, x).reshape(x.shape[0], groups, -1).var(-1, unbiased=False, keepdim=True)
    coefficient = torch.rsqrt(variance + eps).expand(-1, -1, grouped.shape[-1]).reshape(x.shape)
    channels = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (None if one is None else one.view(channels) for one in (weight, bias))
    return _scaled(op, status, centred, coefficient, weight, bias)


@_of_live
def normalize(op: Operation, x: Tensor, status: Live) -> Live:
    """`F.normalize`: x over its frozen length."""
    length = _wide(op, x).norm(op.get(1, "p", 2.0), op.get(2, "dim", 1), keepdim=True)
    return status.then(status.linear / length.clamp_min(op.get(3, "eps", 1e-12)).to(status.linear.dtype))
