"""Switches that make products less precise are off inside the freeze, and as they were outside."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin import linearize
from loclin.common.surroundings import exact_arithmetic
from loclin.maps.linear_map import LinearMap
from loclin.network.chain import Chain

NEW = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has no such switch")


def _now():
    """What torch may do with float32 products, and how it sums those of half precision."""
    matmul = torch.backends.cuda.matmul
    single = [
        getattr(getattr(place, name), "fp32_precision", "ieee")
        for place, names in ((torch.backends.cuda, ["matmul"]), (torch.backends.cudnn, ["conv", "rnn"]),
                             (torch.backends.mkldnn, ["matmul", "conv", "rnn"]))
        for name in names if hasattr(place, name)
    ] if hasattr(matmul, "fp32_precision") else [matmul.allow_tf32, torch.backends.cudnn.allow_tf32]  # fmt: skip
    return single, [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction]


def _exact(switches):
    return {*switches[0]} <= {"ieee", False} and not any(switches[1])


@pytest.fixture(params=["highest", "high", "medium"])
def careless(request):
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision(request.param)
    matmul.allow_bf16_reduced_precision_reduction = True
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    matmul.allow_bf16_reduced_precision_reduction = before[1]


def test_switches_are_set_and_restored(careless):
    before = _now()
    assert not _exact(before)
    with exact_arithmetic():
        assert _exact(_now())
        with exact_arithmetic():
            pass
        assert _exact(_now())
    assert _now() == before
    assert torch.get_float32_matmul_precision() == careless


def test_an_error_restores_them_too(careless):
    before = _now()
    with pytest.raises(KeyError), exact_arithmetic():
        raise KeyError
    assert _now() == before
    assert torch.get_float32_matmul_precision() == careless


@NEW
def test_newer_switches_do_not_get_in_the_way():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with exact_arithmetic():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.usefixtures("careless")
def test_tracing_and_sweeps_are_exact():
    model, seen, before = tiny.llama(dtype=torch.float32), [], _now()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(_now()))
    lin = linearize(model, tiny.prompt())
    runs = [len(seen)]
    own = lin.jacobian()
    J = LinearMap(Chain(lin.trace, explicit=False), own.source, own.target, own.position)  # runs the modules again
    assert J.rmatvec(J.value).shape == J.input.shape
    runs.append(len(seen))
    assert lin.certify().bit_identical
    assert 0 < runs[0] < runs[1] < len(seen), "each step runs the layer"
    assert all(map(_exact, seen))
    assert not _exact(before)
    assert _now() == before
