"""Explicit products equal the generic ones for every family whose weights the table names."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import tiny
from loclin import explicit
from loclin.chain import Chain
from loclin.errors import NotExactError
from loclin.freeze import Hold
from loclin.linear_map import LinearMap
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.models.layout import EXPLICIT

FAMILIES = {name: partial(families.build, name) for name in EXPLICIT}


@pytest.fixture
def always(monkeypatch):
    """Count the layers that go the explicit way, which tiny models would mostly not."""
    used = []
    plain = explicit.ExplicitLayer.vjp

    def counted(self, *args):
        used.append(self)
        return plain(self, *args)

    monkeypatch.setattr(explicit.ExplicitLayer, "vjp", counted)
    return used


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_to_generic(build, gate, position, dtype, always):
    lin = linearize(build(dtype=dtype), tiny.prompt(9), gate=gate)
    layers = lin.trace.n_layers
    J = lin.jacobian(position=position)
    dense = J.dense()
    assert len(always) == layers
    generic = LinearMap(Chain(lin.trace, explicit=False), J.source, J.target, J.position).dense()
    assert len(always) == layers
    assert (dense - generic).norm() < (1e-13 if dtype == torch.float64 else 1e-6) * generic.norm()


def test_attention_that_looks_ahead(always):
    lin = linearize(tiny.gemma3(bidirectional=True), tiny.prompt(9), precision="double")
    J = lin.jacobian(position=2)
    assert (J.dense()[:, 3:].abs().amax(dim=(0, 2)) > 0).any()
    assert len(always) == 3
    assert lin.certify(position=2).passed


@pytest.mark.parametrize("formed", [1, 3000])
@pytest.mark.parametrize("rows", [1, 40])
def test_groups_and_chunks_change_nothing(monkeypatch, formed, rows):
    lin = linearize(tiny.gemma3(), tiny.prompt(7))
    J = lin.jacobian()
    expected = J.dense()
    monkeypatch.setattr(explicit, "_FORMED_NUMBERS", formed)
    monkeypatch.setattr("loclin.chain._CHUNK_ROWS", rows)
    again = LinearMap(lin.chain, J.source, J.target, J.position).dense()
    assert (again - expected).norm() < 1e-13 * expected.norm()


def test_few_columns_and_unknown_parts_stay_generic():
    lin = linearize(tiny.llama(), tiny.prompt())
    link = lin.chain.layers[0]
    assert explicit.worth_it(link, 24)
    assert not explicit.worth_it(link, 2)
    assert not explicit.worth_it(Chain(lin.trace, Hold(ordinary=True)).layers[0], 24)
    link.module.self_attn.o_proj = nn.Sequential(link.module.self_attn.o_proj)
    assert not explicit.worth_it(link, 24)


def test_a_wrong_coefficient_is_noticed(monkeypatch):
    lin = linearize(tiny.llama(), tiny.prompt())
    right = explicit._diagonal
    monkeypatch.setattr(
        explicit, "_diagonal", lambda output, source: None if (f := right(output, source)) is None else 1.01 * f
    )
    with pytest.raises(NotExactError, match=r"model\.layers\.2: explicit and generic products differ"):
        lin.jacobian().dense()
