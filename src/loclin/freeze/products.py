"""Products x * y: linear in one live factor, with the others frozen at their values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loclin.freeze import narrow
from loclin.freeze.attention import check_not_shared
from loclin.freeze.operation import Operation, Result, Slot, everywhere, nowhere
from loclin.freeze.status import Coefficient, Live

FACTORS: dict[str, tuple[tuple[Slot, ...], tuple[Slot, ...]]] = {
    **dict.fromkeys(("mul", "multiply", "matmul", "rmatmul"), ((0, 1, "other"), ())),
    **dict.fromkeys(("mm", "bmm"), ((0, 1, "mat2"), ())),
    **dict.fromkeys(("imul", "rmul", "mv", "dot", "inner", "outer", "tensordot"), ((0, 1), ())),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv_transpose1d"), ((0, "input", 1, "weight"), (2, "bias"))),
    **dict.fromkeys(("baddbmm", "addbmm"), ((1, "batch1", 2, "batch2"), (0, "input"))),
    "addmm": ((1, "mat1", 2, "mat2"), (0, "input")),
    "addcmul": ((1, "tensor1", 2, "tensor2"), (0, "input")),
    "einsum": ((1, 2, 3, 4), ()),
}
"""The slots of the factors, and of what is added to the product."""
_SCALES = ("mul", "multiply", "imul", "rmul", "div", "divide", "true_divide", "itruediv")
MIXERS = ("matmul", "bmm", "einsum")


def product(op: Operation) -> Result:
    """A product: one live factor stays live, every other factor is frozen.

    Of two live factors the one behind an activation is the gate, and `FreezeOptions.gate` says which one is frozen.
    Without an activation the left one is frozen, as attention weights are to the left of what they mix. A factor that
    is not affine is always frozen. A tensor times a function of itself, such as z * sigmoid(z), is an activation.
    """
    if op.name == "einsum" and isinstance(op.args[1], tuple | list):  # its factors may come as one list
        op = replace(op, args=(op.args[0], *op.args[1]))
    among = [each for each in op.dependents() if each[0] in FACTORS[op.name][0]]
    lives = [(slot, status) for slot, _, status in among if isinstance(status, Live)]
    frozen = [(tensor, status) for _, tensor, status in among if isinstance(status, Coefficient)]
    if not lives:
        return _without_live(op, [status for _, status in frozen])
    if len(lives) == 1:
        (slot, one), scale = lives[0], op.name in _SCALES
        for tensor, status in frozen:
            if status.probabilities and op.name in MIXERS:
                check_not_shared(op)
                op.context.keep_probabilities(tensor)
        own = scale and any(status.root is one.root for _, status in frozen)
        active = own or (scale and not frozen and one.active)
        return _live(op, slot, root=one.root if scale and (own or not frozen) else None, active=active)
    if len(lives) > 2:
        return _live(op, lives[-1][0])
    (left, a), (right, b) = lives
    if op.context.scores is not None and op.name in (*MIXERS, "baddbmm"):
        op.context.scores.note(a.linear, b.linear)
        return op.wrap(_with_live(op, left, right), nonlinear=op.nonlinear(everywhere))
    if a.root is b.root and op.name in _SCALES:
        return _live(op, left if b.active else right, root=a.root, active=True)
    if (a.nonlinear is None) != (b.nonlinear is None):  # only one of them can be live
        return _live(op, right if b.nonlinear is None else left)
    if a.active == b.active:
        return _live(op, right)
    gate, up = (left, right) if a.active else (right, left)
    split = op.context.options.gate
    if split == "half":
        linear = 0.5 * (_with_live(op, gate) + _with_live(op, up))
        return op.wrap(linear, nonlinear=op.nonlinear(lambda slot: slot in (gate, up)))
    return _live(op, gate if split == "up" else up)


def _without_live(op: Operation, frozen: list[Coefficient]) -> Result:
    """A product of coefficients, and of what does not depend on the input."""
    if not frozen:
        return op.coefficient()
    first = frozen[0]
    if first.probabilities and op.name in MIXERS and len(frozen) == 1:
        return op.constant()  # attention to what does not depend on the input, such as sound
    return Coefficient(first.origin, first.root, first.probabilities and op.name in _SCALES)


def _with_live(op: Operation, *ones: Slot) -> Tensor:
    """The linearised value with some factors live, and with what is added to the product."""
    added = FACTORS[op.name][1]
    if op.name == "linear" and ones[0] in (0, "input") and _has_narrow_weight(op):
        return _times_narrow_weight(op)
    linear: Tensor = op.recompute(lambda slot: slot in ones or slot in added, lambda slot: slot in added)
    return linear


def _has_narrow_weight(op: Operation) -> bool:
    """Whether a linear module's weight and bias are its own, and the weight has to be widened."""
    weight, bias = op.get(1, "weight"), op.get(2, "bias")
    constant = op.status(weight) is None and op.status(bias) is None
    return constant and narrow.is_narrow(weight, op.context.dtype)


def _times_narrow_weight(op: Operation) -> Tensor:
    """The linearised value of a linear module, without a widened copy of its weight in the graph."""
    status, weight, bias = op.status(op.get(0, "input")), op.get(1, "weight"), op.get(2, "bias")
    assert isinstance(status, Live)
    moved = narrow.linear(status.linear, weight.detach())
    return moved if bias is None else moved + op.context.constant(op.cast(bias), bias, op.name)


def _live(op: Operation, one: Slot, root: object = None, active: bool = False) -> Result:
    added = FACTORS[op.name][1]
    return op.wrap(_with_live(op, one), root, active, op.nonlinear(lambda slot: slot == one or slot in added))


def quotient(op: Operation) -> Result:
    """A quotient: the denominator is frozen."""
    numerator = op.status(op.args[0])
    if op.get(2, "rounding_mode") is not None or numerator is None:
        return op.coefficient()
    if isinstance(numerator, Coefficient):
        return Coefficient(numerator.origin, numerator.root)
    below = op.get(1, "other")
    status = op.status(below)
    linear: Tensor = op.recompute(lambda slot: slot == 0, nowhere)
    constant = status is None
    own = status is not None and status.root is numerator.root
    root = numerator.root if constant or own else None
    return numerator.then(linear, root, own or (constant and numerator.active))


def glu(op: Operation) -> Result:
    """A * sigmoid(b), the two halves of one tensor: the sigmoid is frozen."""
    status = op.status(op.args[0])
    if not isinstance(status, Live):
        return status
    dim = op.get(1, "dim", -1)
    gate = op.cast(op.args[0]).chunk(2, dim)[1].sigmoid()
    return status.then(status.linear.chunk(2, dim)[0] * gate)


def grouped_mm(op: Operation) -> Result:
    """`F.grouped_mm(rows, matrices, offs=)` of mixtures of experts, group by group, so that every dtype works."""
    rows, matrices = op.args[0], op.args[1]
    status, offsets, bias = op.status(rows), op.get(2, "offs"), op.get(3, "bias")
    if not isinstance(status, Live) or op.status(matrices) is not None or offsets is None or bias is not None:
        return op.coefficient()
    ends = offsets.tolist()
    parts = [
        status.linear[start:end] @ op.cast(matrices[group])
        for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    rest = status.linear.new_zeros(len(rows) - ends[-1], matrices.shape[-1])
    return status.then(torch.cat([*parts, rest]))
