"""A language model, at one prompt, as the linear map that it exactly is there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loclin import freeze, steering
    from loclin.analyses.attribute import attribute
    from loclin.analyses.attribution import Attribution
    from loclin.analyses.explain import Explanation, explain
    from loclin.analyses.generation import Generation, generate
    from loclin.analyses.target import Direction, Margin, Neuron
    from loclin.analyses.validity import Validity, validity
    from loclin.batch import linearize_batch
    from loclin.certify import Certificate
    from loclin.errors import LoclinError
    from loclin.linear_map import LinearMap
    from loclin.linearization import Linearization, linearize
    from loclin.models import Model, load, wrap
    from loclin.results import Provenance, compare
    from loclin.spectral import SVD

__version__ = "0.1.0"
__all__ = [
    "SVD",
    "Attribution",
    "Certificate",
    "Direction",
    "Explanation",
    "Generation",
    "LinearMap",
    "Linearization",
    "LoclinError",
    "Margin",
    "Model",
    "Neuron",
    "Provenance",
    "attribute",
    "Validity",
    "compare",
    "explain",
    "freeze",
    "generate",
    "linearize",
    "linearize_batch",
    "load",
    "validity",
    "steering",
    "wrap",
]

_ROOMS = {
    "SVD": "spectral",
    "Attribution": "analyses.attribution",
    "Certificate": "certify",
    "Direction": "analyses.target",
    "Explanation": "analyses.explain",
    "Generation": "analyses.generation",
    "LinearMap": "linear_map",
    "Linearization": "linearization",
    "LoclinError": "errors",
    "Margin": "analyses.target",
    "Model": "models",
    "Neuron": "analyses.target",
    "Provenance": "results",
    "attribute": "analyses.attribute",
    "Validity": "analyses.validity",
    "compare": "results",
    "explain": "analyses.explain",
    "generate": "analyses.generation",
    "load": "models",
    "linearize": "linearization",
    "linearize_batch": "batch",
    "validity": "analyses.validity",
    "wrap": "models",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `loclin --help` need not wait for torch."""
    if name in ("freeze", "steering"):
        return import_module(f"loclin.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'loclin' has no attribute {name!r}")
    return getattr(import_module(f"loclin.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
