"""What only a GPU can test: maps on a device, and layers on several."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.linearization import linearize
from loclin.network.split_choice import Shares, given_shares

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("build", [tiny.llama, tiny.gemma3])
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_the_map_is_the_cpu_s(build, gate):
    ids = tiny.prompt(8)
    expected = linearize(build(), ids, gate=gate, precision="double").jacobian().dense()
    lin = linearize(build().cuda(), ids, gate=gate, precision="double")
    dense = lin.jacobian().dense()
    assert dense.is_cuda
    assert lin.certify().passed
    assert (dense.cpu() - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formed", [0.5, 2.0])
def test_split_products_are_as_accurate_as_those_of_float32(stored, formed):
    model, ids = tiny.gemma3(dtype=torch.bfloat16).to("cuda", stored), tiny.prompt(8)
    given = given_shares.set(Shares(0.5, formed))
    try:
        lin = linearize(model, ids, precision="split")
    finally:
        given_shares.reset(given)
    assert all(lin.trace.split.layers)
    expected = linearize(model, ids, precision="single").jacobian().dense()
    assert (lin.jacobian().dense() - expected).norm() < tiny.rounding() * expected.norm()
    assert "bf16 products" in linearize(model, ids, precision="split").trace.split.note  # as this GPU has it


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices():
    accelerate = pytest.importorskip("accelerate")
    places = {"model.layers.2": 1, "model.norm": 1} | {
        name: 0 for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "lm_head")
    }
    model = accelerate.dispatch_model(tiny.llama(), places)
    assert linearize(model, tiny.prompt(8), precision="double").certify().passed
