"""What is held, and how a held operation keeps the model's own value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loclin.errors import NotExactError, OptionError

Gate = Literal["activation", "up", "half"]
Precision = Literal["stock", "double"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Hold:
    """Which coefficients are held, and in what precision.

    Parameters
    ----------
    gate
        The split of act(gate) * up: `"activation"` holds act(gate) (the paper), `"up"` holds up and lets the gate's
        branch live through its secant, `"half"` is the mean of both.
    precision
        `"stock"`: the model's own casts, and a forward pass that is bit-identical to the model's. `"double"`: norms
        and softmax, which models cast to float32, are kept in the model's dtype; for float64 models, whose map is
        then exact to 1e-13 instead of 1e-8.
    ordinary
        Hold nothing: the ordinary Jacobian, for comparison (the paper's Figure 3).
    """

    gate: Gate = "activation"
    precision: Precision = "stock"
    ordinary: bool = False

    def __post_init__(self) -> None:
        if self.gate not in get_args(Gate):
            raise OptionError(f"gate={self.gate!r}: choose one of {', '.join(get_args(Gate))}")
        if self.precision not in get_args(Precision):
            raise OptionError(f"precision={self.precision!r}: choose one of {', '.join(get_args(Precision))}")


def with_value_of(orig: Tensor, lin: Tensor, hold: Hold, where: str) -> Tensor:
    """`lin`'s gradient with `orig`'s value, bit for bit; refuse when the two differ.

    Under `precision="double"` the value is `lin`'s own, which is the more precise of the two.

    Raises
    ------
    NotExactError
        When `lin` is not what the module computes: the rule does not fit the module named `where`.
    """
    with torch.no_grad():
        error = (lin - orig).norm() / orig.norm().clamp_min(torch.finfo(orig.dtype).tiny)
    if not error <= _TOLERANCE[orig.dtype]:
        raise NotExactError(
            f"{where}: its frozen linear form differs from its real output by {error:.1e}; "
            "loclin's rule for it does not describe this module"
        )
    if hold.precision == "double":
        return lin
    return orig.detach() + (lin - lin.detach())
