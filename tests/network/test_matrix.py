"""Weights in a sweep: widened by rows or as a whole, once, and only those through which something flows."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.common.sums import relative_error
from loclin.linearization import linearize
from loclin.maps.linear_map import LinearMap
from loclin.models import tiny as families
from loclin.network.blocks import Workspace
from loclin.network.chain import Chain
from loclin.network.matrix import Matrix


@pytest.mark.parametrize("rows", [1, 256, 257])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_first_and_later_products_are_right(rows, stored):
    random = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=random).to(stored) for shape in ((20, 12), (20,)))
    x, y = torch.randn(rows, 12, generator=random), torch.randn(rows, 20, generator=random)
    own = Matrix("w", weight, bias, torch.float32, Workspace())
    pushed, pulled = x.double() @ weight.double().T, y.double() @ weight.double()
    for out in (None, torch.empty(rows, 20), None):
        found = own.push(x, out)
        assert relative_error(found.double() - pushed, pushed) < tiny.rounding()
    affine = pushed + bias.double()
    assert relative_error(own.push(x, affine=True).double() - affine, affine) < tiny.rounding()
    for out in (None, torch.empty(rows, 12)):
        assert relative_error(own.pull(y, out).double() - pulled, pulled) < tiny.rounding()


@pytest.fixture
def widened(monkeypatch):
    """The names of the weights that are widened, in order, by rows or as a whole."""
    names: list[str] = []
    by_rows, whole = Matrix._goes_by_rows, Matrix.whole.func

    def goes(self, block):
        found = by_rows(self, block)
        names.extend([f"{self._name} by rows"] if found else [])
        return found

    def widen(self):
        names.append(self._name)
        return whole(self)

    monkeypatch.setattr(Matrix, "_goes_by_rows", goes)
    monkeypatch.setattr(Matrix.whole, "func", widen)
    return names


@pytest.mark.parametrize(("gate", "branches"), [("activation", {"up"}), ("up", {"gate"}), ("half", {"up", "gate"})])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_each_live_weight_is_widened_once_for_a_layer(widened, family, gate, branches):
    hf = families.build(family, dtype=torch.bfloat16)
    lin = linearize(hf, tiny.prompt(5), gate=gate)
    J, n = lin.jacobian(), lin.trace.n_layers
    assert all(lin.trace.explicit)
    widened.clear()
    J.rmatmat(torch.ones(3, J.shape[0]))
    assert sorted(widened) == sorted([f"{name} by rows" for name in {"v", "o", "down"} | branches] * n)
    widened.clear()
    J.rmatmat(torch.ones(40, J.shape[0]))
    assert not any(name.startswith(("gate", "up")) and name.split()[0] not in branches for name in widened)
    assert sum(" " not in name for name in widened) <= n * (3 + len(branches))


def test_chunks_widen_a_weight_as_a_whole_from_the_second_on(widened, monkeypatch):
    lin = linearize(tiny.llama(dtype=torch.bfloat16), tiny.prompt(5))
    J = lin.jacobian()
    expected = J.rmatmat(torch.eye(J.shape[0]))
    monkeypatch.setattr("loclin.network.chain._CHUNK_ROWS", 5)
    widened.clear()
    found = J.rmatmat(torch.eye(J.shape[0]))
    assert relative_error(found - expected, expected) < tiny.rounding()
    assert {widened.count(name) for name in set(widened)} == {lin.trace.n_layers}


@pytest.mark.parametrize("columns", [1, 30])
def test_sweeps_over_narrow_weights_equal_generic_ones(columns):
    lin = linearize(tiny.gemma3(dtype=torch.bfloat16), tiny.prompt(9))
    J, random = lin.jacobian(), torch.Generator().manual_seed(0)
    generic = LinearMap(Chain(lin.trace, explicit=False), J.source, J.target, J.position)
    cotangents = torch.randn(columns, J.shape[0], generator=random)
    tangents = torch.randn(columns, *J.shape[1:], generator=random)
    for found, right in (
        (J.rmatmat(cotangents), generic.rmatmat(cotangents)),
        (J.matmat(tangents), generic.matmat(tangents)),
    ):
        assert relative_error(found - right, right) < tiny.rounding()
