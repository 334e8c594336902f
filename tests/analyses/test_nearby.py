"""The model at moved inputs is the model itself: bit for bit where nothing moved, and as if the tokens were others."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.analyses.nearby import Nearby
from loclin.freeze import FreezeOptions
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.models import wrap
from loclin.models.forward import logits_at

BUILDS = {
    "llama": tiny.llama,
    "llama-float32": lambda: tiny.llama(dtype=torch.float32),
    "gemma3": tiny.gemma3,
    "gemma3-bidirectional": lambda: tiny.gemma3(bidirectional=True),
    "gpt2": lambda: families.build("gpt2", dtype=torch.float64),
    "gemma3n": lambda: families.build("gemma3n_text", dtype=torch.float64),
}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def lin(request):
    return linearize(wrap(request.param()), tiny.prompt(6) % 32, strict=False)


@pytest.mark.parametrize("position", [-1, 2])
def test_at_the_prompt_it_is_the_model_bit_for_bit(lin, position):
    with torch.no_grad():
        expected = logits_at(lin.model, lin.input_ids, position % 6)
    nearby = Nearby(lin, position)
    for found in (nearby.embeddings(lin.embeddings[None]), nearby.tokens(lin.input_ids)):
        assert torch.equal(found.logits[0], expected)
        assert torch.equal(found.final[0], lin.trace.stock_final[0, position])
        assert torch.equal(found.embeddings[0], lin.embeddings)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lin.model.hf.modules())


def test_the_maps_own_precision_does_not_matter():
    lin = linearize(tiny.llama(dtype=torch.float32), tiny.prompt(5), precision="double")
    found = Nearby(lin).embeddings(lin.embeddings[None])
    assert torch.equal(found.logits[0], lin.trace.stock_logits)


def test_other_embeddings_are_other_tokens(lin):
    """In a batch too; where token ids reach the layers by other ways as well, those stay."""
    others = tiny.prompt(6, seed=3).repeat(3, 1) % 32
    others[1, 2] += 1
    nearby = Nearby(lin)
    swapped = nearby.tokens(others)
    if lin.trace.sequence.fallback_reason is None:
        assert torch.allclose(nearby.embeddings(swapped.embeddings).logits, swapped.logits, atol=2e-5)
    with torch.no_grad():
        expected = lin.model.hf(input_ids=others, use_cache=False).logits[:, -1]
    assert torch.allclose(swapped.logits, expected, atol=2e-5)


def test_shorter_prompts_run_too(lin):
    shorter = lin.input_ids[:, 1:]
    with torch.no_grad():
        expected = logits_at(lin.model, shorter, 4)
    assert torch.equal(Nearby(lin).tokens(shorter).logits[0], expected)


def test_it_can_be_differentiated():
    lin = linearize(tiny.gemma3(), tiny.prompt(6))
    x = lin.embeddings.clone().requires_grad_()
    found = Nearby(lin).embeddings(x[None])
    (slope,) = torch.autograd.grad(found.final[0, 3], x)
    unit = torch.zeros(len(found.final[0]), dtype=x.dtype)
    unit[3] = 1
    assert torch.allclose(slope, lin.ordinary_jacobian().rmatvec(unit), rtol=1e-5, atol=1e-6)
    assert lin.ordinary_jacobian().chain.options == FreezeOptions(ordinary=True)
