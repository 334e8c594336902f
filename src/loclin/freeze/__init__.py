"""Freezing: every torch operation also computes a linearised value, with its nonlinear coefficients frozen."""

from loclin.freeze.context import frozen
from loclin.freeze.mode import Frozen
from loclin.freeze.options import FreezeOptions, Gate, Precision, SharedAttention
from loclin.freeze.rules import ModuleCall, Registration, register
from loclin.freeze.status import NonlinearUse, Origin

__all__ = [
    "ModuleCall",
    "Frozen",
    "Gate",
    "FreezeOptions",
    "NonlinearUse",
    "Origin",
    "Precision",
    "Registration",
    "SharedAttention",
    "frozen",
    "register",
]
