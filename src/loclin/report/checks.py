"""A certificate's errors in words, for every kind of report."""

from __future__ import annotations

from dataclasses import dataclass

from loclin.certify import FORWARD_TOLERANCE, Certificate
from loclin.report.text import error


@dataclass(frozen=True)
class Check:
    """One error of a certificate.

    Attributes
    ----------
    name, formula, meaning
        What it is: in a word, in symbols, in a sentence.
    value
        The error as text.
    limit
        What it must not pass, as text.
    passed
        Whether it does not.
    """

    name: str
    formula: str
    meaning: str
    value: str
    limit: str
    passed: bool


def checks(certificate: Certificate) -> list[Check]:
    """List every error that decides whether a map counts as exact, the reconstruction first."""
    c, limit = certificate, certificate.tolerance

    def check(name: str, formula: str, meaning: str, value: float) -> Check:
        return Check(name, formula, meaning, error(value), error(limit), value <= limit)

    return [
        check(
            "reconstruction",
            "|Jx + b − y| / |y|",
            "The map, applied to the prompt's own embeddings, gives back the output.",
            c.reconstruction_error,
        ),
        Check(
            "forward",
            "|y − y_model| / |y_model|",
            "Holding the coefficients leaves the model's own forward pass as it was.",
            "bit-identical" if c.bit_identical else error(c.forward_error),
            error(FORWARD_TOLERANCE),
            c.bit_identical or c.forward_error <= FORWARD_TOLERANCE,
        ),
        check("adjoint", "⟨u, Jv⟩ = ⟨Jᵀu, v⟩", "The map and its transpose belong together.", c.adjoint_error),
        check("linearity", "J(av + w) = aJv + Jw", "It is linear, tried on random vectors.", c.linearity_error),
        check(
            "second derivative",
            "∂J/∂x = 0",
            "It no longer depends on its input: nothing nonlinear was left live.",
            c.second_derivative,
        ),
        check(
            "rows",
            "sampled rows of J",
            "Rows agree with a slow, separate backward pass through the whole model.",
            c.row_error,
        ),
    ]
