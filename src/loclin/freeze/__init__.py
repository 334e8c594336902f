"""Which coefficients are held: the linear twin of every torch operation, and the context that computes it."""

from loclin.freeze.context import frozen
from loclin.freeze.hold import Gate, Hold, Precision
from loclin.freeze.mode import Frozen
from loclin.freeze.rules import Call, Registration, register
from loclin.freeze.status import Misuse, Origin

__all__ = [
    "Call",
    "Frozen",
    "Gate",
    "Hold",
    "Misuse",
    "Origin",
    "Precision",
    "Registration",
    "frozen",
    "register",
]
