"""A language model, at one prompt, as the linear map that it exactly is there.

>>> model = loclin.load("smollm2-135m")
>>> lin = loclin.linearize(model, "The bridge out of Marin is the")
>>> lin.explain()
>>> J = lin.jacobian()  # J @ lin.embeddings + J.bias is the final hidden state
>>> J.svd(8)
>>> lin.attribute(" only", by="head")
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from loclin.common.shared import quiet_imports

if TYPE_CHECKING:
    from loclin import figures, freeze, steering
    from loclin.analyses.attribution.attribute import attribute
    from loclin.analyses.attribution.heads import Head, Path
    from loclin.analyses.attribution.result import Attribution
    from loclin.analyses.attribution.scores import AttentionScore, attention_score
    from loclin.analyses.attribution.target import (
        Direction,
        Entropy,
        LogProb,
        Margin,
        Neuron,
        Probability,
        Score,
        Span,
    )
    from loclin.analyses.coverage.result import Coverage
    from loclin.analyses.coverage.run import coverage
    from loclin.analyses.decode import Decoder
    from loclin.analyses.estimate import Estimate, estimate
    from loclin.analyses.explain import Explanation, explain
    from loclin.analyses.exploration.explore import explore
    from loclin.analyses.exploration.result import Exploration
    from loclin.analyses.faithfulness.disruption import Disruption, disruption
    from loclin.analyses.faithfulness.items import load_items
    from loclin.analyses.faithfulness.study import Faithfulness, faithfulness
    from loclin.analyses.generation import Generation, generate
    from loclin.analyses.intervene import Interventions, intervene
    from loclin.analyses.layers import LayerExplanation, explain_layers
    from loclin.analyses.logit_lens import LogitLens, logit_lens
    from loclin.analyses.patching import Patching, patch
    from loclin.analyses.prompt_comparison import PromptComparison, compare_prompts
    from loclin.analyses.similarity import Similarity, similarity
    from loclin.analyses.validity import Validity, validity
    from loclin.errors import (
        BudgetError,
        LoclinError,
        MissingExtraError,
        ModelError,
        NotExactError,
        OptionError,
        OutputError,
        PromptError,
        ResultError,
        SteeringError,
    )
    from loclin.freeze import SharedAttention
    from loclin.linearization import Linearization, linearize, linearize_batch
    from loclin.maps.certificate import Certificate
    from loclin.maps.layer_spectra import LayerSpectra
    from loclin.maps.linear_map import LinearMap
    from loclin.maps.plan import Plan
    from loclin.models import Model, load, wrap
    from loclin.reproduction.run import Reproduction, reproduce
    from loclin.results.compare import Comparison, compare
    from loclin.results.provenance import Provenance
    from loclin.results.result import Result
    from loclin.spectral import SVD, Norms
    from loclin.steering.steer import Steered, steer
    from loclin.steering.watch import Watched, watch

__version__ = "0.1.0"
__all__ = [
    "AttentionScore",
    "Attribution",
    "BudgetError",
    "Certificate",
    "Comparison",
    "Coverage",
    "Decoder",
    "Direction",
    "Disruption",
    "Entropy",
    "Estimate",
    "Explanation",
    "Exploration",
    "Faithfulness",
    "Generation",
    "Head",
    "Interventions",
    "LayerExplanation",
    "LayerSpectra",
    "LinearMap",
    "Linearization",
    "LoclinError",
    "LogProb",
    "LogitLens",
    "Margin",
    "MissingExtraError",
    "Model",
    "ModelError",
    "Neuron",
    "Norms",
    "NotExactError",
    "OptionError",
    "OutputError",
    "Patching",
    "Path",
    "Plan",
    "Probability",
    "PromptComparison",
    "PromptError",
    "Provenance",
    "Reproduction",
    "Result",
    "ResultError",
    "SVD",
    "SharedAttention",
    "Score",
    "Similarity",
    "Span",
    "Steered",
    "SteeringError",
    "Validity",
    "Watched",
    "attention_score",
    "attribute",
    "compare",
    "compare_prompts",
    "coverage",
    "disruption",
    "estimate",
    "explain",
    "explain_layers",
    "explore",
    "faithfulness",
    "figures",
    "freeze",
    "generate",
    "intervene",
    "linearize",
    "linearize_batch",
    "load",
    "load_items",
    "logit_lens",
    "patch",
    "reproduce",
    "similarity",
    "steer",
    "steering",
    "validity",
    "watch",
    "wrap",
]

_MODULES = {
    "analyses.attribution.attribute": ("attribute",),
    "analyses.attribution.heads": ("Head", "Path"),
    "analyses.attribution.result": ("Attribution",),
    "analyses.attribution.scores": ("AttentionScore", "attention_score"),
    "analyses.attribution.target": (
        "Direction",
        "Entropy",
        "LogProb",
        "Margin",
        "Neuron",
        "Probability",
        "Score",
        "Span",
    ),
    "analyses.coverage.result": ("Coverage",),
    "analyses.coverage.run": ("coverage",),
    "analyses.decode": ("Decoder",),
    "analyses.estimate": ("Estimate", "estimate"),
    "analyses.explain": ("Explanation", "explain"),
    "analyses.exploration.explore": ("explore",),
    "analyses.exploration.result": ("Exploration",),
    "analyses.faithfulness.disruption": ("Disruption", "disruption"),
    "analyses.faithfulness.items": ("load_items",),
    "analyses.faithfulness.study": ("Faithfulness", "faithfulness"),
    "analyses.generation": ("Generation", "generate"),
    "analyses.intervene": ("Interventions", "intervene"),
    "analyses.layers": ("LayerExplanation", "explain_layers"),
    "analyses.logit_lens": ("LogitLens", "logit_lens"),
    "analyses.patching": ("Patching", "patch"),
    "analyses.prompt_comparison": ("PromptComparison", "compare_prompts"),
    "analyses.similarity": ("Similarity", "similarity"),
    "analyses.validity": ("Validity", "validity"),
    "errors": (
        "BudgetError",
        "LoclinError",
        "MissingExtraError",
        "ModelError",
        "NotExactError",
        "OptionError",
        "OutputError",
        "PromptError",
        "ResultError",
        "SteeringError",
    ),
    "freeze.options": ("SharedAttention",),
    "linearization": ("Linearization", "linearize", "linearize_batch"),
    "maps.certificate": ("Certificate",),
    "maps.layer_spectra": ("LayerSpectra",),
    "maps.linear_map": ("LinearMap",),
    "maps.plan": ("Plan",),
    "models": ("Model", "load", "wrap"),
    "reproduction.run": ("Reproduction", "reproduce"),
    "results.compare": ("Comparison", "compare"),
    "results.provenance": ("Provenance",),
    "results.result": ("Result",),
    "spectral": ("SVD", "Norms"),
    "steering.steer": ("Steered", "steer"),
    "steering.watch": ("Watched", "watch"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `loclin --help` need not wait for torch."""
    if name not in _HOMES and name not in ("figures", "freeze", "steering"):
        raise AttributeError(f"module 'loclin' has no attribute {name!r}")
    home = f"loclin.{_HOMES.get(name, name)}"
    # results show themselves in a notebook; errors need neither torch nor a look
    needed = [home] if name not in _HOMES or home == "loclin.errors" else ["loclin.report", home]
    if not set(needed) <= sys.modules.keys():
        with quiet_imports():
            for module in needed:
                import_module(module)
    found = import_module(home)
    return getattr(found, name) if name in _HOMES else found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
