"""Explicit products equal the generic ones for every family whose weights the table names."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import tiny
from least import within
from loclin.freeze import FreezeOptions
from loclin.linearization import linearize
from loclin.maps.linear_map import LinearMap
from loclin.models import tiny as families
from loclin.network import explicit_mlp
from loclin.network.anatomy import EXPLICIT
from loclin.network.blocks import Workspace
from loclin.network.chain import Chain
from loclin.network.explicit_mlp import ExplicitMLP
from loclin.network.reader import CoefficientReader

FAMILIES = {name: partial(families.build, name) for name in EXPLICIT}


def generic(J: LinearMap) -> LinearMap:
    """The same map by generic links."""
    return LinearMap(Chain(J.chain.trace, explicit=False), J.source, J.target, J.position)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def columns(monkeypatch):
    """Lower the number of columns from which on matrices are formed: those of tiny models hardly pay."""

    def lowered(least: int) -> None:
        monkeypatch.setattr(ExplicitMLP, "forms_matrices", lambda _self, columns: columns >= least)

    return lowered


@pytest.mark.sampled(10)
@pytest.mark.parametrize("formed", [True, False], ids=["formed", "factored"])
@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_generic(build, gate, position, dtype, formed, columns):
    columns(1 if formed else 10**9)
    lin = linearize(build(dtype=dtype), tiny.prompt(9), gate=gate)
    assert all(lin.trace.explicit)
    J, limit = lin.jacobian(position=position), tiny.rounding(dtype)
    random = torch.Generator().manual_seed(0)
    tangents = torch.randn(3, *J.shape[1:], generator=random, dtype=dtype)
    assert far(J.dense(), generic(J).dense()) < limit
    assert far(J.matmat(tangents), generic(J).matmat(tangents)) < limit


@pytest.mark.parametrize("position", [2, -1])
def test_attention_that_looks_ahead(position):
    lin = linearize(tiny.gemma3(bidirectional=True), tiny.prompt(9), precision="double")
    J = lin.jacobian(position=position)
    assert not lin.trace.causal
    assert all(lin.trace.explicit)
    assert (J.dense()[:, 3:].abs().amax(dim=(0, 2)) > 0).any()
    tangents = torch.randn(2, *J.shape[1:]).to(J.dense())
    assert far(J.matmat(tangents), torch.einsum("oti,nti->no", J.dense(), tangents)) < 1e-13
    assert lin.certify(position=position).passed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("formed", [1, 3000])
@pytest.mark.parametrize("rows", [1, 40])
def test_groups_and_chunks_change_nothing(monkeypatch, formed, rows):
    lin = linearize(tiny.gemma3(), tiny.prompt(7))
    J = lin.jacobian()
    expected = J.dense()
    monkeypatch.setattr(explicit_mlp, "_FORMED_NUMBERS", formed)
    monkeypatch.setattr(explicit_mlp, "_ROWS", rows)
    monkeypatch.setattr("loclin.network.chain._CHUNK_ROWS", rows)
    again = LinearMap(lin.chain, J.source, J.target, J.position)
    assert far(again.dense(), expected) < 1e-13
    assert far(again.matmat(expected[:2]), J.matmat(expected[:2])) < 1e-13


def test_coefficients_that_are_not_kept_are_read_again():
    kept = linearize(tiny.gemma3(), tiny.prompt(7))
    lin = within(tiny.gemma3(), tiny.prompt(7), 1000)
    assert None not in kept.trace.coefficients
    assert None in lin.trace.coefficients
    assert all(lin.trace.explicit)
    assert far(lin.jacobian().dense(), kept.jacobian().dense()) < 1e-14


def test_what_the_table_does_not_know_stays_generic():
    model = tiny.llama()
    model.model.layers[1].self_attn.o_proj = nn.Sequential(model.model.layers[1].self_attn.o_proj)
    lin = linearize(model, tiny.prompt())
    assert lin.trace.explicit == (True, False, True)
    assert lin.certify().passed
    lin = linearize(tiny.llama(), tiny.prompt())
    assert Chain(lin.trace, FreezeOptions(ordinary=True)).layers[0].explicit(Workspace()) is None


def test_a_layer_that_does_more_than_its_class_says_stays_generic():
    model = tiny.llama()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: 2 * output)
    lin = linearize(model, tiny.prompt())
    assert lin.trace.explicit == (True, False, True)
    assert lin.certify().passed
    handle.remove()
    assert far(lin.jacobian().dense(), linearize(model, tiny.prompt()).jacobian().dense()) > 1e-3


def test_a_wrong_coefficient_is_noticed(monkeypatch):
    right = CoefficientReader.coefficients
    monkeypatch.setattr(
        CoefficientReader, "coefficients", lambda self, probs: replace(held := right(self, probs), up=1.01 * held.up)
    )
    assert not any(linearize(tiny.llama(), tiny.prompt()).trace.explicit)
