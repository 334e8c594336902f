"""What is known of a tensor that depends on the frozen network's input."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loclin.common.brief import brief


@dataclass(frozen=True)
class Origin:
    """Where an operation took place: the module's path, the operation's name, and its line of code."""

    module: str
    operation: str
    line: str

    def __str__(self) -> str:
        return f"{self.module}: {self.operation} ({self.line})"


@dataclass(frozen=True)
class Misuse:
    """A coefficient that is added to a live tensor, or leaves a layer alone: what it breaks is not linear.

    `error` is the coefficient's share of what it is added to: |coefficient| / |sum|.
    """

    origin: Origin
    error: float


@dataclass(frozen=True, eq=False)
class Live:
    """A tensor that is affine in the input: `linear` is its twin on the linear path, and has the graph.

    `root` names the tensor that this one is a function of, element by element; `active` is True behind an activation,
    so that a product with it is a gated one. `broken` is set where a coefficient was added: then the twin is not the
    tensor, and may not leave the network. It may still be a coefficient itself.
    """

    linear: Tensor
    root: object = field(default_factory=object)
    active: bool = False
    broken: Misuse | None = None

    __repr__ = brief

    def then(self, linear: Tensor, root: object = None, active: bool = False) -> Live:
        """What a linear operation makes of this tensor."""
        return Live(linear, object() if root is None else root, active, self.broken)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that is not affine in the input: good as a coefficient, and for nothing else.

    `probabilities` is True for what a softmax gave, until something is mixed with it.
    """

    origin: Origin
    root: object = field(default_factory=object)
    probabilities: bool = False


Status = Live | Held | None
"""None: the tensor does not depend on the input."""
