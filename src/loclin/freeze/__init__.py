"""Which coefficients are held, as rules, and the context manager that holds them."""

from loclin.freeze.context import biases, evaluation, frozen
from loclin.freeze.hold import Gate, Hold, Precision
from loclin.freeze.rules import covered

__all__ = ["Gate", "Hold", "Precision", "biases", "covered", "evaluation", "frozen"]
