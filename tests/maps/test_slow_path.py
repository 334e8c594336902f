"""The certificate's slow path: the same rows as one graph of the whole model, one layer's graph at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

import tiny
from loclin.freeze.pattern import WholePattern
from loclin.linearization import linearize
from loclin.maps.certificate import certify
from loclin.maps.slow_path import SlowPath
from loclin.models import tiny as families
from loclin.network.chain import Chain
from loclin.network.graph import network_graph
from loclin.network.link import LayerLink

ROWS = [0, 5, 7]
MODELS = {
    "llama": lambda dtype: tiny.llama(dtype=dtype, biases=True),
    "gemma3": lambda dtype: tiny.gemma3(dtype=dtype),
    "phi": lambda dtype: families.build("phi", dtype=dtype),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_rows_equal_those_of_one_graph(build, dtype, position):
    hf = build(dtype)
    lin = linearize(hf, families.prompt(hf))
    trace, at = lin.trace, position % 7
    graph = network_graph(trace, lin.chain.options)
    x, y = graph.points["resid_pre"], graph.points["resid_post"]
    rows = torch.cat([torch.autograd.grad(y[0, at, row], x, retain_graph=True)[0] for row in ROWS])
    slow = SlowPath(trace, lin.chain.options, at, ROWS)
    assert slow.row_error(rows) < tiny.rounding(torch.float32)
    assert slow.row_error(1.001 * rows) > 9e-4
    assert slow.second_derivative == 0


def test_one_graph_is_held_at_a_time(monkeypatch):
    lin = linearize(tiny.llama(), tiny.prompt())
    right, held = LayerLink.graph, []

    def graph(self, *args, **kwargs):
        assert not any(ref() is not None for ref in held)
        found = right(self, *args, **kwargs)
        held.extend(weakref.ref(tensor) for tensor in found.points.values())
        return found

    monkeypatch.setattr(LayerLink, "graph", graph)
    assert lin.certify().passed
    assert held


def swap_layers(lin):
    lin.chain.layers[0], lin.chain.layers[1] = lin.chain.layers[1], lin.chain.layers[0]


def swap_steps(lin):
    right = Chain.steps

    class Swapped(Chain):
        def steps(self, *args, **kwargs):
            found = right(self, *args, **kwargs)
            return [found[1], found[0], *found[2:]]

    lin.chain.__class__ = Swapped


def change(**by):
    def fault(lin):
        first, *others = lin.trace.coefficients
        changed = {name: factor * getattr(first, name) for name, factor in by.items()}
        lin.trace.coefficients = (replace(first, **changed), *others)

    return fault


def forget_attention(lin):
    first, *others = lin.trace.coefficients
    lin.trace.coefficients = (
        replace(first, pattern=WholePattern(torch.zeros(first.pattern.shape, dtype=lin.trace.dtype))),
        *others,
    )


FAULTS = {
    "layers in another order": swap_layers,
    "steps in another order": swap_steps,
    "one coefficient off by 1 %": change(up=1.01),
    "one norm off by 1 %": change(attn_in=0.99),
    "no attention in a layer": forget_attention,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_of_the_sweeps_are_found(fault, dtype):
    lin = linearize(tiny.llama(dtype=dtype), tiny.prompt())
    assert certify(lin.jacobian()).passed
    fault(lin)
    found = certify(lin.jacobian())
    assert not found.passed
    assert found.row_error > found.tolerance


def test_a_layer_whose_coefficient_is_not_held_is_found(monkeypatch):
    """Where a rule is missing, the vjp depends on the input."""
    lin = linearize(tiny.llama(), tiny.prompt())
    right = LayerLink.graph

    def graph(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        if self.index == 1:
            post = found.points["resid_post"]
            found.points["resid_post"] = post + 1e-3 * found.points["resid_pre"].square()
        return found

    monkeypatch.setattr(LayerLink, "graph", graph)
    found = certify(lin.jacobian())
    assert not found.passed
    assert found.second_derivative > found.tolerance


def test_a_network_that_is_one_block_has_one_graph(monkeypatch):
    expected = linearize(tiny.llama(biases=True), tiny.prompt())
    monkeypatch.setattr("loclin.network.sequence._Watcher.fallback_reason", lambda _self: "a test says so")
    lin = linearize(tiny.llama(biases=True), tiny.prompt())
    assert lin.trace.n_layers == 1
    assert lin.certify().passed
    rows = expected.jacobian().rmatmat(torch.eye(24, dtype=torch.float64)[ROWS])
    slow = SlowPath(lin.trace, lin.chain.options, 6, ROWS)
    assert slow.row_error(rows) < tiny.rounding(torch.float32)
