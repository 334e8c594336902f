"""What is counted before a sweep is what the sweep does, and plans take the cheapest way."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from least import within
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.maps.linear_map import LinearMap
from loclin.maps.plan import expected_columns, plan
from loclin.models import tiny as families
from loclin.network.cost import sweep_cost


def fresh(lin):
    J = lin.jacobian()
    return LinearMap(lin.chain, J.source, J.target, J.position)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("columns", [4, 24])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("gate", ["activation", "half"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_counted_flops_are_done(family, gate, length, columns):
    lin = linearize(families.build(family), tiny.prompt(length), gate=gate)
    J = fresh(lin)
    counted = sweep_cost(lin.chain, J.source, J.target, columns)
    assert counted.columns == columns
    with FlopCounterMode(display=False) as done:
        J.rmatmat(torch.randn(columns, J.shape[0], dtype=J.dtype))
    assert done.get_total_flops() == pytest.approx(counted.flops)


@pytest.mark.parametrize("point", ["embed", "resid_mid.1", "resid_post.1"])
def test_a_map_that_passes_no_layer_has_a_plan_too(point):
    J = linearize(tiny.llama(), tiny.prompt()).jacobian(point, point)
    assert sweep_cost(J.chain, J.source, J.target, 4).flops == 0
    assert J.svd(2, method=J.plan(2).chosen).S[-1].tolist() == pytest.approx(
        [1, 1]
    )  # the identity, at its own position


def test_a_plan_is_a_table_that_says_what_is_taken():
    lin = linearize(tiny.llama(), tiny.prompt())
    found = lin.cost(k=3)
    assert {route.name for route in found.methods} == {"lapack", "block_krylov", "matrix_free"}
    assert [route.cost.seconds for route in found.methods] == sorted(route.cost.seconds for route in found.methods)
    assert "<- chosen" in str(found)
    assert str(found).count("\n") == 3
    assert lin.jacobian().cached_dense is None, "nothing was run"


def test_what_is_known_is_not_made_again():
    lin = linearize(tiny.llama(), tiny.prompt())
    J = fresh(lin)
    J.dense()
    found = J.plan(3)
    assert found.chosen in ("lapack", "block_krylov")
    assert min(route.cost.columns for route in found.methods) == 0


def test_wide_maps_go_without_the_dense_map(monkeypatch):
    lin = linearize(tiny.llama(), tiny.prompt())
    J = fresh(lin)
    monkeypatch.setattr(LinearMap, "shape", (4096, 7, 4096))
    assert plan(J, 2, joint=True, tolerance=1e-3).chosen == "matrix_free"


def test_beyond_the_budget_there_is_no_dense_map():
    J = within(tiny.llama(), tiny.prompt(12), 14 * 24 * 24 * 8).jacobian()
    free = linearize(tiny.llama(), tiny.prompt(12)).jacobian()
    assert not J.fits_in_budget
    assert free.fits_in_budget
    for joint in (False, True):
        found, expected = J.svd(3, joint=joint), free.svd(3, joint=joint, method="lapack")
        assert torch.allclose(found.S, expected.S, rtol=1e-3)
        assert bool((found.lower <= expected.S * (1 + 1e-12)).all())
        assert bool((found.upper >= expected.S * (1 - 1e-12)).all())
    assert torch.allclose(J.norms().largest, free.norms().largest, rtol=0.02)
    assert torch.allclose(J.singular_values(), free.singular_values(), rtol=1e-9, atol=1e-12)
    assert J.cached_dense is None


def test_columns_grow_with_what_is_asked():
    joint, each = expected_columns(8, 8, True, 2048), expected_columns(8, 8, False, 2048)
    assert expected_columns(1, 8, False, 2048) < each < expected_columns(8, 64, False, 2048) <= 4096
    assert joint < each


def test_unknown_ways_are_refused():
    with pytest.raises(OptionError, match="choose one of"):
        plan(fresh(linearize(tiny.llama(), tiny.prompt())), 2, joint=False, tolerance=1e-3, method="best")
