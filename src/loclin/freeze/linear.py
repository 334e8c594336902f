"""Operations that are linear in everything they are given: views, sums, casts, and writing one tensor into another."""

from __future__ import annotations

from torch import Tensor

from loclin.freeze.operation import Operation, Result, everywhere, nowhere, words
from loclin.freeze.status import Held, Live

VIEWS = words(
    "view reshape view_as reshape_as transpose t permute movedim moveaxis swapaxes swapdims T mT H mH flatten "
    "unflatten squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk split "
    "split_with_sizes tensor_split hsplit vsplit unbind getitem select narrow index_select gather take_along_dim "
    "masked_select diagonal unfold flip roll contiguous clone positive"
)
"""A result's every element is one of the argument's."""
CASTS = words("to float double half bfloat16 type type_as cpu cuda")
SUMS = words("sum mean cumsum neg negative diff tril triu diag_embed nansum dropout alpha_dropout")
"""Linear, with nothing to add."""
AFFINE = words(
    "add sub subtract rsub iadd isub radd cat concat concatenate stack hstack vstack dstack where masked_fill setitem "
    "index_put index_add index_copy index_fill scatter scatter_add masked_scatter copy fill zero"
)
"""Linear, and a constant argument is added to, or put beside, what is live."""
_ELEMENTWISE = words("neg negative add sub subtract rsub iadd isub radd clone contiguous") | CASTS
"""With constants, these keep the result a function of the argument's element."""


def linear(op: Operation) -> Result:
    """Do an operation again on the live tensors."""
    if op.name in VIEWS and op.status(op.args[0]) is None:
        return None  # only the other tensor's shape was read
    found = op.dependents()
    held = [status for _, _, status in found if isinstance(status, Held)]
    lives = [status for _, _, status in found if isinstance(status, Live)]
    if held and not lives:
        return _pass_on(op, held[0])
    additive = _behind_the_condition if op.name == "where" else everywhere if op.name in AFFINE else nowhere
    linear = op.again(everywhere, additive)
    same_root = all(status.root is lives[0].root for status in lives) and not held
    root = lives[0].root if same_root and op.name in _ELEMENTWISE else None
    active = lives[0].active and len(lives) == 1 and op.name in VIEWS | _ELEMENTWISE
    return op.wrap(linear, root, active, op.broken(everywhere))


def _behind_the_condition(slot: int | str) -> bool:
    return slot not in (0, "condition")


def _pass_on(op: Operation, held: Held) -> Result:
    """The status of coefficients that were only moved about."""
    same = op.name in VIEWS or op.name in CASTS or op.name == "dropout"
    status = Held(held.origin, held.root, held.probabilities and same)
    return status if isinstance(op.out, Tensor) or op.in_place else [status for _ in op.out]


def cast(op: Operation) -> Result:
    """Change of dtype or device: the linear path keeps its own dtype, and follows to the device."""
    status = op.status(op.args[0])
    if not isinstance(status, Live):
        return status
    moved = status.linear.to(op.out.device)
    if moved is status.linear and op.out is not op.args[0]:
        moved = moved.clone()
    return status.then(moved, status.root, status.active)


def same(op: Operation) -> Result:
    """The tensor itself; where a model stops its gradient, what it computes still depends on the input."""
    return op.status(op.args[0])


def pad(op: Operation) -> Result:
    """Padding with zeros is linear; padding with anything else adds a constant that is not collected."""
    mode, value = op.get(2, "mode", "constant"), op.get(3, "value")
    return op.held() if mode == "constant" and value else linear(op)


CONSTANT = words(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor "
    "size stride dim numel shape device dtype is_floating_point is_contiguous data_ptr grad item tolist "
    "requires_grad_ record_stream register_hook storage_offset untyped_storage"
)
"""Only the shape is read."""
