"""What only a GPU can test: its reduced precisions, and layers on several. Others run there with `--device cuda`."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.linearization import linearize
from loclin.network.split_choice import Shares, given_shares

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_reduced_precision_does_not_reach_the_map():
    model, ids = tiny.llama(dtype=torch.float32).cuda(), tiny.prompt(8).cuda()
    exact = linearize(model, ids).jacobian().dense()
    torch.set_float32_matmul_precision("medium")
    try:
        again = linearize(model, ids).jacobian().dense()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(again, exact)


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
