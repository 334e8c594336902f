"""What only a GPU can test: its reduced precisions, and layers on several. Others run there with `--device cuda`."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.linearization import linearize

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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices():
    accelerate = pytest.importorskip("accelerate")
    places = {"model.layers.2": 1, "model.norm": 1} | {
        name: 0 for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "lm_head")
    }
    model = accelerate.dispatch_model(tiny.llama(), places)
    assert linearize(model, tiny.prompt(8), precision="double").certify().passed
