"""Watched singular vectors are found, their parts are exact, and taking them out is a projection."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny
from loclin.errors import LoclinError, SteeringError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.steering import watch as analysis
from loclin.steering.projection import Projection
from loclin.steering.watch import watch


@pytest.fixture
def model(monkeypatch):
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, tiny.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in (5, 20)]
    monkeypatch.setattr(analysis, "packaged_concepts", lambda: type("C", (), {"choosing": prompts}))
    hf = tiny.llama(dtype=torch.float64)
    return wrap(hf, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


@pytest.fixture
def lin(model):
    return linearize(model, tiny.prompt(5, seed=4), precision="double")


def test_hits_and_their_parts(model, lin):
    svd, head = lin.jacobian().svd(24), model.hf.lm_head.weight.detach()
    word = (head @ svd.U[2, :, 0] * torch.sign(svd.Vh[2, 0] @ lin.embeddings[2])).argmax().item()
    found = watch(lin, [f"w{word}"], k=24, top=1, sinks=True, max_new_tokens=4)
    assert (2, 1) in [(hit.token, hit.rank) for hit in found.hits]
    parts = torch.zeros(tiny.VOCABULARY, dtype=torch.float64)
    for i in range(5):
        for j in range(24):
            u, c = svd.U[i, :, j], svd.S[i, j] * (svd.Vh[i, j] @ lin.embeddings[i])
            hit = (head @ (u * c)).argmax().item() == word
            assert hit == ((i, j + 1) in [(h.token, h.rank) for h in found.hits])
            if hit:
                parts += head @ (u * c)
    for share in found.shares:
        token = int(share.text.removeprefix(" w"))
        assert share.part == pytest.approx(parts[token].item(), rel=1e-7)
        assert share.logit == pytest.approx(model.hf(lin.input_ids).logits[0, -1, token].item(), rel=1e-5)
    assert any(share.watched for share in found.shares)
    projection = found.projection
    vectors = torch.stack([svd.U[h.token, :, h.rank - 1] for h in found.hits])
    torch.testing.assert_close(projection.basis @ (projection.basis.T @ vectors.T), vectors.T)


@pytest.mark.parametrize("layer", [None, 1])
def test_what_is_taken_out_is_gone(model, lin, layer, tmp_path):
    head = model.hf.lm_head.weight.detach()
    J = lin.jacobian() if layer is None else lin.jacobian(target=f"resid_post.{layer}", normed=True)
    svd = J.svd(2)
    words = {int((head @ svd.U[i, :, 0] * torch.sign(svd.Vh[i, 0] @ lin.embeddings[i])).argmax()) for i in range(5)}
    found = watch(lin, [f"w{w}" for w in words], k=1, top=1, layer=layer, sinks=True, max_new_tokens=4)
    assert len(found.hits) == 5
    path = tmp_path / "p.safetensors"
    found.projection.save(path)
    seen = {}
    module = model.hf.model.norm if layer is None else model.hf.model.layers[layer]
    before = model.hf(lin.input_ids).logits
    with Projection.load(path).apply(model):
        handle = module.register_forward_hook(lambda _m, _a, out: seen.update(h=out[0, -1].detach()))
        after = model.hf(lin.input_ids).logits
        handle.remove()
    assert torch.equal(model.hf(lin.input_ids).logits, before)
    directions = svd.U[:, :, 0] if layer is None else lin.chain.norm(J.target, 4).vjp(svd.U[:, :, 0])
    assert (directions @ seen["h"]).abs().max() < 1e-9 * seen["h"].norm()
    ids = sorted(words)
    gain = after[0, -1].log_softmax(-1)[ids].logsumexp(0) - before[0, -1].log_softmax(-1)[ids].logsumexp(0)
    assert found.here.gain == pytest.approx(gain.item(), abs=1e-5)
    assert found.elsewhere.prompts == 2
    assert found.normal.ids != found.without.ids or found.here.kl < 0.5
    with pytest.raises(SteeringError), found.projection.apply(wrap(tiny.llama(seed=5))):
        pass


def test_nothing_found_and_nothing_to_find(lin):
    logits = lin.value("logits")[-1]
    found = watch(lin, [f"w{logits.argmin().item()}"], k=1, top=1, sinks=True, max_new_tokens=2)
    if not found.hits:
        assert found.projection.basis.shape[1] == 0
        assert found.here is None
        assert all(share.part == 0 for share in found.shares)
    for words in ([], ["absent"]):
        with pytest.raises(LoclinError):
            watch(lin, words)


def test_sinks_are_left_out_unless_asked_for(lin, monkeypatch):
    """What an attention sink's map writes is likely anywhere; only `sinks=True` looks at it."""
    words = [f"w{i}" for i in range(1, tiny.VOCABULARY)]
    monkeypatch.setattr(type(lin), "sinks", [1])
    found = watch(lin, words, k=2, top=1, max_new_tokens=2)
    assert found.searched == 8
    assert {hit.token for hit in found.hits} <= {0, 2, 3, 4}
    everything = watch(lin, words, k=2, top=1, sinks=True, max_new_tokens=2)
    assert everything.searched == 10
    assert 1 in {hit.token for hit in everything.hits}
