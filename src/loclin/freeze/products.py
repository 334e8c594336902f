"""Products: linear in one live factor, the others held at their values."""

from __future__ import annotations

from torch import Tensor

from loclin.freeze.operation import Operation, Result, Slot
from loclin.freeze.status import Held, Live

FACTORS: dict[str, tuple[tuple[Slot, ...], tuple[Slot, ...]]] = {
    "mul": ((0, 1, "other"), ()),
    "multiply": ((0, 1, "other"), ()),
    "imul": ((0, 1), ()),
    "rmul": ((0, 1), ()),
    "matmul": ((0, 1, "other"), ()),
    "rmatmul": ((0, 1, "other"), ()),
    "mm": ((0, 1, "mat2"), ()),
    "bmm": ((0, 1, "mat2"), ()),
    "mv": ((0, 1), ()),
    "dot": ((0, 1), ()),
    "inner": ((0, 1), ()),
    "outer": ((0, 1), ()),
    "tensordot": ((0, 1), ()),
    "linear": ((0, "input", 1, "weight"), (2, "bias")),
    "conv1d": ((0, "input", 1, "weight"), (2, "bias")),
    "conv2d": ((0, "input", 1, "weight"), (2, "bias")),
    "conv_transpose1d": ((0, "input", 1, "weight"), (2, "bias")),
    "addmm": ((1, "mat1", 2, "mat2"), (0, "input")),
    "baddbmm": ((1, "batch1", 2, "batch2"), (0, "input")),
    "addbmm": ((1, "batch1", 2, "batch2"), (0, "input")),
    "addcmul": ((1, "tensor1", 2, "tensor2"), (0, "input")),
    "einsum": ((1, 2, 3, 4), ()),
}
"""Places of the factors, and of what is added to the product."""
_SCALES = ("mul", "multiply", "imul", "rmul", "div", "divide", "true_divide", "itruediv")
MIXERS = ("matmul", "bmm", "einsum")


def product(op: Operation) -> Result:
    """A product: one live factor stays live, every other factor is held.

    Of two live factors the one behind an activation is the gate, and is split as the option says; without an
    activation the left one is held, as it is where a matrix of weights stands in front of what it mixes. One that is
    no longer affine is held whatever the option says. A tensor times a function of itself, as in z * sigmoid(z), is
    an activation.
    """
    factors, added = FACTORS[op.name]
    found = op.dependents()
    among = [(slot, tensor, status) for slot, tensor, status in found if slot in factors]
    lives = [(slot, tensor, status) for slot, tensor, status in among if isinstance(status, Live)]
    held = [(tensor, status) for _, tensor, status in among if isinstance(status, Held)]
    if not among:
        return op.held()
    if not lives:
        return Held(held[0][1].origin, held[0][1].root, held[0][1].probabilities and op.name in _SCALES)

    if len(lives) == 1:
        (slot, _, one), scale = lives[0], op.name in _SCALES
        for tensor, status in held:
            if status.probabilities and op.name in MIXERS:
                op.context.keep_probabilities(tensor)
        own = scale and any(status.root is one.root for _, status in held)
        active = own or (scale and not held and one.active)
        return _live(op, slot, root=one.root if scale and (own or not held) else None, active=active)
    if len(lives) > 2:
        return _live(op, lives[-1][0])
    (left, _, a), (right, _, b) = lives
    if a.root is b.root and op.name in _SCALES:
        return _live(op, left if b.active else right, root=a.root, active=True)
    if (a.broken is None) != (b.broken is None):  # only one of them can be live
        return _live(op, right if b.broken is None else left)
    if a.active == b.active:
        return _live(op, right)
    gate, up = (left, right) if a.active else (right, left)
    split = op.context.hold.gate
    if split == "half":
        linear = 0.5 * (_with_live(op, gate) + _with_live(op, up))
        return op.wrap(linear, broken=op.broken(lambda slot: slot in (gate, up)))
    return _live(op, gate if split == "up" else up)


def _with_live(op: Operation, one: Slot) -> Tensor:
    """The product with one factor live, and what is added to it."""
    added = FACTORS[op.name][1]
    linear: Tensor = op.again(lambda slot: slot == one or slot in added, lambda slot: slot in added)
    return linear


def _live(op: Operation, one: Slot, root: object = None, active: bool = False) -> Result:
    added = FACTORS[op.name][1]
    return op.wrap(_with_live(op, one), root, active, op.broken(lambda slot: slot == one or slot in added))


def quotient(op: Operation) -> Result:
    """A quotient: the denominator is held."""
    numerator = op.status(op.args[0])
    if op.get(2, "rounding_mode") is not None or numerator is None:
        return op.held()
    if isinstance(numerator, Held):
        return Held(numerator.origin, numerator.root)
    below = op.get(1, "other")
    status = op.status(below)
    linear: Tensor = op.again(lambda slot: slot == 0, lambda _slot: False)
    constant = status is None
    own = status is not None and status.root is numerator.root
    root = numerator.root if constant or own else None
    return numerator.then(linear, root, own or (constant and numerator.active))


def glu(op: Operation) -> Result:
    """A * sigmoid(b), the two halves of one tensor: the sigmoid is held."""
    status = op.status(op.args[0])
    if not isinstance(status, Live):
        return status
    dim = op.get(1, "dim", -1)
    gate = op.cast(op.args[0]).chunk(2, dim)[1].sigmoid()
    return status.then(status.linear.chunk(2, dim)[0] * gate)
