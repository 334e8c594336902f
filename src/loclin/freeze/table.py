"""How each torch operation is linearised. The result of an operation that is not in the table is a coefficient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from loclin.freeze import linear, norms, products, unary
from loclin.freeze.attention import attention, softmax
from loclin.freeze.operation import Operation, Result

Handler = Callable[[Operation], Result]


HANDLERS: Mapping[str, Handler] = {
    **dict.fromkeys(linear.VIEWS | linear.SUMS | linear.AFFINE, linear.linear),
    **dict.fromkeys(linear.CASTS, linear.cast),
    **dict.fromkeys(("detach", "data", "alias", "requires_grad"), linear.same),
    **dict.fromkeys(linear.CONSTANT, lambda _op: None),
    **dict.fromkeys(products.FACTORS, products.product),
    **dict.fromkeys(("div", "divide", "true_divide", "itruediv"), products.quotient),
    **dict.fromkeys(unary.ACTIVATIONS | unary.SQUASHES | unary.CLAMPS, unary.unary),
    "glu": products.glu,
    "pad": linear.pad,
    "as_strided": linear.as_strided,
    "scatter_reduce": linear.scatter_reduce,
    "softmax": softmax,
    "rms_norm": norms.rms_norm,
    "layer_norm": norms.layer_norm,
    "group_norm": norms.group_norm,
    "normalize": norms.normalize,
    "scaled_dot_product_attention": attention,
    "grouped_mm": products.grouped_mm,
}

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv")


def plain_name(func: Callable[..., Any]) -> str:
    """`add` for `Tensor.add`, `Tensor.__add__`, `torch.add` and `add_`; a property's name for its getter."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument."""
    if not args or kwargs.get("inplace") is True:
        return bool(args)
    name: str = getattr(func, "__name__", "")
    changes = name.strip("_") in IN_PLACE if name.startswith("__") else name.endswith("_") and name != "requires_grad_"
    return changes and isinstance(args[0], Tensor)
