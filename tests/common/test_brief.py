"""What is printed of an object by itself: one short line, whatever the object holds."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn

import loclin
import tiny
from loclin.analyses.explain import explain
from loclin.analyses.generation import generate
from loclin.analyses.layers import explain_layers
from loclin.analyses.validity import validity
from loclin.linearization import linearize
from loclin.steering import Operator

MOST = 300


def public_dataclasses():
    names = [info.name for info in pkgutil.walk_packages(loclin.__path__, "loclin.") if "__main__" not in info.name]
    found = {
        item
        for name in names
        for item in vars(importlib.import_module(name)).values()
        if isinstance(item, type) and is_dataclass(item)
    }
    return sorted((c for c in found if c.__module__.startswith("loclin.") and c.__name__[0] != "_"), key=str)


def large(kind: str):
    """Something large that a field of this type may hold."""
    if "Tensor" in kind:
        return torch.zeros(100, 100)
    if "Callable" in kind or kind in ("Matches", "Install"):
        return large
    if "Module" in kind:
        return nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    if "dict" in kind or "Mapping" in kind:
        return {str(number): number for number in range(1000)}
    if any(name in kind for name in ("list", "tuple", "Sequence", "Words", "set[", "Any")):
        return list(range(1000))
    return 0.1234567890123 if "float" in kind else "text"


@pytest.mark.parametrize("cls", public_dataclasses(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_repr_does_not_grow_with_what_is_held(cls):
    if "repr=False" in str(cls.__dataclass_params__):
        return  # one of its own: see below
    full = object.__new__(cls)
    for field in fields(cls):
        object.__setattr__(full, field.name, large(str(field.type)))
    shown = repr(full)
    assert shown.startswith(f"{cls.__name__}(")
    assert len(shown) <= MOST
    assert "\n" not in shown


@pytest.mark.slow
def test_results_of_a_prompt_are_shown_in_a_line():
    lin = linearize(tiny.gemma3(), tiny.prompt(40))
    J, found, layers = lin.jacobian(), explain(lin, k=2), explain_layers(lin, k=2)
    shares = lin.attribute(by="head")
    written = generate(lin, 2, k=2)
    results = [
        *(lin, lin.trace, lin.trace.sequence, lin.trace.anatomy, lin.chain, J, J.plan(2), J.norms(), J.provenance()),
        *(J.svd(2), J.svd(2, joint=True), lin.certify(), lin.layer_spectra(k=2), layers, layers.main, layers.lens[0]),
        *(found, found.tokens[0], found.tokens[0].blocks[0], shares, shares.top(1)[0], written),
        *(
            validity(lin, draws=1, swaps=0),
            lin.head(0, 0),
            lin.attention_score("L0H0"),
            lin.intervene("T1"),
            lin.patch(lin),
            lin.path(["L0H0"], token=0),
            Operator.make(lin, 1),
        ),
        lin.similarity(),
        lin.explore(count=9),
    ]
    for result in results:
        shown = repr(result)
        assert len(shown) <= MOST, type(result)
        assert "\n" not in shown
    assert repr(J.svd(2)).startswith("SVD(U=float64[40, 24, 2], S=float64[40, 2]")
