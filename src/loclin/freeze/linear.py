"""Operations that are linear in all their arguments: views, sums, casts, and writes of one tensor into another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loclin.freeze.operation import Operation, Result, everywhere, nowhere, words
from loclin.freeze.status import Coefficient, Live

VIEWS = words(
    "view reshape view_as reshape_as transpose t permute movedim moveaxis swapaxes swapdims T mT H mH flatten "
    "unflatten squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk split "
    "split_with_sizes tensor_split hsplit vsplit unbind getitem select narrow index_select gather take_along_dim "
    "masked_select diagonal unfold flip roll contiguous clone positive"
)
"""Every element of the result is an element of the argument."""
CASTS = words("to float double half bfloat16 type type_as cpu cuda")
SUMS = words("sum mean avg_pool2d cumsum neg negative diff tril triu diag_embed nansum dropout alpha_dropout")
"""Linear, without an added constant."""
AFFINE = words(
    "add sub subtract rsub iadd isub radd cat concat concatenate stack hstack vstack dstack where masked_fill setitem "
    "index_put index_add index_copy index_fill scatter scatter_add masked_scatter copy fill zero"
)
"""Linear; a constant argument is added to the live ones, or put beside them."""
_ELEMENTWISE = words("neg negative add sub subtract rsub iadd isub radd clone contiguous") | CASTS
"""Element-wise: with constants, each element of the result is a function of the argument's."""


def linear(op: Operation) -> Result:
    """Apply the operation to the live tensors' linearised values."""
    if op.name in VIEWS and op.status(op.args[0]) is None:
        return None  # only the other tensor's shape was read
    found = op.dependents()
    coefficients = [status for _, _, status in found if isinstance(status, Coefficient)]
    lives = [status for _, _, status in found if isinstance(status, Live)]
    if coefficients and not lives:
        return _pass_on(op, coefficients[0])
    if op.context.scores is not None and _lowers_by_maximum(op, coefficients):
        return lives[0].then(lives[0].linear)  # a softmax is the same with the largest score taken off all
    additive = _behind_the_condition if op.name == "where" else everywhere if op.name in AFFINE else nowhere
    linear = op.recompute(everywhere, additive)
    same_root = all(status.root is lives[0].root for status in lives) and not coefficients
    root = lives[0].root if same_root and op.name in _ELEMENTWISE else None
    active = lives[0].active and len(lives) == 1 and op.name in VIEWS | _ELEMENTWISE
    return op.wrap(linear, root, active, op.nonlinear(everywhere))


def _lowers_by_maximum(op: Operation, coefficients: list[Coefficient]) -> bool:
    """Whether the largest of some live numbers is taken off all of them."""
    origins = [one.origin.operation for one in coefficients]
    return op.name == "sub" and origins == ["max"] and isinstance(op.status(op.args[0]), Live)


def _behind_the_condition(slot: int | str) -> bool:
    return slot not in (0, "condition")


def _pass_on(op: Operation, coefficient: Coefficient) -> Result:
    """The status of a coefficient that was only moved, or summed with others."""
    same = op.name in VIEWS or op.name in CASTS or op.name == "dropout"
    status = Coefficient(coefficient.origin, coefficient.root, coefficient.probabilities and same)
    return status if isinstance(op.out, Tensor) or op.in_place else [status for _ in op.out]


def cast(op: Operation) -> Result:
    """Change of dtype or device: the linear path keeps its dtype, and moves to the device."""
    status = op.status(op.args[0])
    if not isinstance(status, Live):
        return status
    moved = status.linear.to(op.out.device)
    if moved is status.linear and op.out is not op.args[0]:
        moved = moved.clone()
    return status.then(moved, status.root, status.active)


def same(op: Operation) -> Result:
    """The tensor itself; also where a model stops the gradient, since the value still depends on the input."""
    return op.status(op.args[0])


def scatter_reduce(op: Operation) -> Result:
    """The largest or smallest of some elements: the choice is frozen, and equal ones share it.

    Anything else is a coefficient: another reduction, or one that takes what stood in the first argument.
    """
    base, dim, index, source = (op.get(i, name) for i, name in enumerate(("input", "dim", "index", "src")))
    status, reduce = op.status(source), op.get(4, "reduce")
    if not isinstance(status, Live) or reduce not in ("amax", "amin") or op.get(5, "include_self", True):
        return op.coefficient()
    if op.status(base) is not None or bool(base.any()):
        return op.coefficient()
    chosen = (op.out.gather(dim, index) == source).to(op.context.dtype)
    ties = torch.zeros(op.out.shape, dtype=op.context.dtype, device=op.out.device).scatter_add(dim, index, chosen)
    share = chosen / ties.gather(dim, index)
    linear = torch.zeros_like(ties).scatter_add(dim, index, status.linear * share)
    return status.then(linear)


def pad(op: Operation) -> Result:
    """Padding is linear; a finite number that it pads with is a constant beside the live tensor."""
    status, value = op.status(op.get(0, "input")), op.get(3, "value")
    if op.get(2, "mode", "constant") != "constant" or not value or not isinstance(status, Live):
        return linear(op)
    if not math.isfinite(value):
        return op.coefficient()
    frame = op.func(torch.zeros_like(status.linear), op.get(1, "pad"), value=value)
    padded = op.recompute(everywhere, nowhere) - frame
    return status.then(padded + op.context.constant(frame, value, op.name))


def as_strided(op: Operation) -> Result:
    """A view by places in memory, where the linearised value may lie otherwise: the same elements of it."""
    x: Tensor = op.get(0, "input")
    status, offset = op.status(x), op.get(3, "storage_offset")
    if not isinstance(status, Live):
        return linear(op)
    own = torch.arange(x.numel(), device=x.device).view(x.shape)
    memory = own.new_full([x.untyped_storage().nbytes() // x.itemsize], -1)
    memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(own)
    start = x.storage_offset() if offset is None else offset
    taken = memory.as_strided(op.get(1, "size"), op.get(2, "stride"), start)
    if bool((taken < 0).any()):  # elements of another tensor
        return op.coefficient()
    return status.then(status.linear.flatten()[taken])


CONSTANT = words(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor "
    "size stride dim numel shape device dtype is_floating_point is_contiguous data_ptr grad item tolist "
    "requires_grad_ record_stream register_hook storage_offset untyped_storage"
)
"""The result depends on the shape only."""
