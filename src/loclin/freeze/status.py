"""The status of a tensor that depends on the frozen network's input: live, or a coefficient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loclin.common.brief import brief


@dataclass(frozen=True)
class Origin:
    """Where an operation was called: the module's path, the operation's name, and its line of code."""

    module: str
    operation: str
    line: str

    def __str__(self) -> str:
        return f"{self.module}: {self.operation} ({self.line})"


@dataclass(frozen=True)
class NonlinearUse:
    """A coefficient used where only a live tensor keeps the network linear: in a sum, or as a layer's output."""

    origin: Origin
    error: float  # its relative size in the sum: |coefficient| / |sum|


@dataclass(frozen=True, eq=False)
class Live:
    """A tensor that is affine in the input.

    `nonlinear` is set where a coefficient was added: the linearised value then differs from the tensor, which may be
    used as a coefficient, but not leave the network.
    """

    linear: Tensor  # its linearised value, with the graph
    root: object = field(default_factory=object)  # the tensor of which this one is a function, element by element
    active: bool = False  # it comes from an activation, so that a product with it is a gated one
    nonlinear: NonlinearUse | None = None

    __repr__ = brief

    def then(self, linear: Tensor, root: object = None, active: bool = False) -> Live:
        """The status of the result of a linear operation on this tensor."""
        return Live(linear, object() if root is None else root, active, self.nonlinear)


@dataclass(frozen=True, eq=False)
class Coefficient:
    """A tensor that is not affine in the input: it can only be used as a frozen coefficient."""

    origin: Origin
    root: object = field(default_factory=object)
    probabilities: bool = False  # the output of a softmax, until something is multiplied by it


Status = Live | Coefficient | None
"""None: the tensor does not depend on the input."""
