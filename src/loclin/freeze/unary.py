"""Activations: f(z) = f(0) + r z with the frozen secant slope r = (f(z) - f(0)) / z (paper, equations 7 to 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loclin.freeze.operation import Operation, Result, words
from loclin.freeze.status import Coefficient, Live

ACTIVATIONS = words(
    "silu gelu relu relu6 mish elu selu celu leaky_relu prelu rrelu hardswish hardshrink softshrink square pow"
)
"""The activations of MLPs."""
SQUASHES = words("tanh erf sigmoid hardsigmoid softplus logsigmoid exp exp2 log rsqrt reciprocal sin cos")
"""Element-wise functions that gate, cap or decay: coefficients, except for the tanh of a soft cap on the logits."""
CLAMPS = words("clamp clip clamp_min clamp_max maximum minimum")
"""Element-wise functions that do not make a gate."""


def unary(op: Operation) -> Result:
    """f(z) as f(0) plus a frozen slope times z; a coefficient if f is not an activation."""
    z = op.args[0] if op.args else op.kwargs["input"]
    status = op.status(z)
    if not isinstance(status, Live):
        return Coefficient(status.origin, status.root) if isinstance(status, Coefficient) else op.coefficient()
    if op.name in SQUASHES and not (op.context.soft_caps and op.name == "tanh"):
        return op.coefficient(root=status.root)
    if any(tensor is not z for _, tensor, _ in op.dependents()):
        return op.coefficient(root=status.root)

    rest = {name: value for name, value in op.kwargs.items() if name not in ("input", "out", "inplace")}
    same = not any(isinstance(value, Tensor) for value in (*op.args[1:], *rest.values()))
    form = secant(lambda value: op.func(value, *op.args[1:], **rest), op.value(z), op.out, op.context.dtype, same)
    if form is None:
        return op.coefficient(root=status.root)
    return form.applied(status, op.context.constant, op.name, status.active or op.name in ACTIVATIONS)


class Secant(NamedTuple):
    """f(z) = at_zero + ratio * z, element by element; `at_zero` is None where f(0) = 0."""

    ratio: Tensor
    at_zero: Tensor | None

    def applied(self, z: Live, constant: Callable[[Tensor, Any, str], Tensor], name: str, active: bool) -> Live:
        """The status of f(z); `constant` is that of the freezing context."""
        linear = z.linear * self.ratio
        if self.at_zero is not None:
            linear = linear + constant(self.at_zero, None, name)
        return z.then(linear, z.root, active)


def secant(
    f: Callable[[Tensor], Tensor], z: Tensor, out: Tensor, dtype: torch.dtype, same: bool = False
) -> Secant | None:
    """The line through f(0) and f(z), element by element; its slope at z = 0 is the limit f'(0).

    `same`: f is one function for all elements. None where f(0) is not finite. Cost: f once more, at zero.
    """
    z = z.detach()
    origin = z.new_zeros([1] * z.dim() if same else z.shape, requires_grad=True)
    with torch.enable_grad():
        at_zero = f(origin.clone())  # a copy, for functions that work in place
    if at_zero.shape != origin.shape or not bool(at_zero.isfinite().all()):
        return None
    start, zero = at_zero.detach().to(dtype), z == 0
    shifted, some_zero = bool(start.any()), bool(zero.any())  # as a rule neither: two passes over all numbers less
    rise = out.detach().to(dtype) - start if shifted else out.detach().to(dtype)
    ratio = rise / (torch.where(zero, 1, z) if some_zero else z).to(dtype)
    if some_zero:
        slope = torch.zeros_like(start)
        if at_zero.requires_grad:
            slope = torch.autograd.grad(at_zero, origin, torch.ones_like(at_zero))[0].to(dtype)
        ratio = torch.where(zero, slope, ratio)
    return Secant(ratio, start.expand_as(ratio) if shifted else None)
