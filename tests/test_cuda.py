"""What only a GPU can test: maps on a device, and layers on several."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.linearization import linearize

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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices():
    accelerate = pytest.importorskip("accelerate")
    places = {"model.layers.2": 1, "model.norm": 1} | {
        name: 0 for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "lm_head")
    }
    model = accelerate.dispatch_model(tiny.llama(), places)
    assert linearize(model, tiny.prompt(8), precision="double").certify().passed
