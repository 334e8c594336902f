"""A certificate's errors in words, for every kind of report."""

from __future__ import annotations

from dataclasses import dataclass

from loclin.certify import Certificate
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


def forward(certificate: Certificate) -> str:
    """Say how far the frozen network's values are from the model's."""
    same = certificate.bit_identical and certificate.forward_error == 0
    return "bit-identical" if same else error(certificate.forward_error)


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
            "The frozen network's values are the model's own, up to the rounding of the model's dtype.",
            forward(c),
            error(c.forward_tolerance),
            c.same_forward,
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
