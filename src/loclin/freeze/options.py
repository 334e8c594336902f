"""What is frozen, and the precision of the linear path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from loclin.common.arguments import real
from loclin.errors import OptionError

Gate = Literal["activation", "up", "half"]
Precision = Literal["auto", "stock", "single", "double", "split"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SharedAttention:
    """How much of the relevance passes an attention by its queries, its keys and its values; not exact.

    Attention P V with P = softmax(Q K^T) is then live in all three, each with its gradient times its weight. The
    default halves the relevance at each product: AttnLRP (Achtibat et al. 2024) and DPA (2603.19742) at their defaults.
    The softmax is not linear, so that shares no longer sum to the target.
    """

    query: float = 0.25
    key: float = 0.25
    value: float = 0.5

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            weight = real(name, getattr(self, name))
            object.__setattr__(self, name, weight)
            if not 0 <= weight <= 1:
                raise OptionError(f"{name}={weight:g}: give a weight from 0 to 1")


@dataclass(frozen=True)
class FreezeOptions:
    """Which coefficients are frozen, and the precision of the linear path.

    The coefficients always come from the model's own forward pass, in the model's own dtype.

    Attributes
    ----------
    gate: the split of act(gate) * up. `"activation"` freezes act(gate) (the paper); `"up"` freezes up, and the gate is
        live through its secant act(gate) / gate; `"half"` is the mean of both.
    precision: the dtype of the linear path, and so of every map and sweep. `"stock"`: the model's own. `"single"`:
        float32. `"double"`: float64; a map is then exact to 1e-13 instead of 1e-7. `"auto"`: float32 for a float16 or
        bfloat16 model, else the model's own. `"split"`: float32, made of bfloat16 products where that is as accurate,
        and faster on this device (see `loclin.linearize`).
    ordinary: freeze nothing, the ordinary Jacobian, for comparison (the paper's Figure 3).
    shared: let relevance through queries and keys too, for comparison; None: attention probabilities are frozen.
    adapters_held: what an adapter (LoRA) adds to a module's output is a constant: the model without it is live alone.
    """

    gate: Gate = "activation"
    precision: Precision = "auto"
    ordinary: bool = False
    shared: SharedAttention | None = None
    adapters_held: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("gate", get_args(Gate)), ("precision", get_args(Precision))):
            if getattr(self, name) not in kinds:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(kinds)}")

    def resolved(self, stock: torch.dtype) -> Precision:
        """The precision that `"auto"` means."""
        return self.precision if self.precision != "auto" else "single" if stock in _HALF else "stock"

    def dtype(self, stock: torch.dtype) -> torch.dtype:
        """The dtype of the linear path in a model that rounds to `stock`."""
        kinds = {"stock": stock, "single": torch.float32, "split": torch.float32, "double": torch.float64}
        return kinds[self.resolved(stock)]

    def keeps_stock(self, stock: torch.dtype) -> bool:
        """Whether the frozen network's values are the model's own, bit for bit; else they are the linear path's."""
        return self.precision != "double" and self.dtype(stock) == stock
