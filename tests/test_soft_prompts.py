"""Vectors in the place of tokens: a soft prompt, alone or in front of a text."""

from __future__ import annotations

import pytest
import torch

import loclin
import oracle
import tiny
from loclin.analyses.attribution.groups import find_groups
from loclin.analyses.nearby import Nearby
from loclin.errors import ModelError, OptionError, PromptError
from loclin.models import tiny as families
from loclin.models import wrap

VECTORS = torch.randn(3, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
MODELS = {"llama": tiny.llama, "gemma3": tiny.gemma3}


@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_maps_from_vectors_are_those_of_the_detached_model(name, length):
    hf, ids = MODELS[name](attn="eager"), tiny.prompt(length) if length else None
    vectors = VECTORS.to(tiny.DEVICE)
    lin = loclin.linearize(wrap(hf), ids, inputs_embeds=vectors, precision="double")
    table = hf.get_input_embeddings()
    given = vectors[None] if ids is None else torch.cat([vectors[None], table(ids)], dim=1)
    J, x, y = oracle.given_jacobian(hf, {"inputs_embeds": given}, -1)
    assert torch.equal(lin.embeddings, x)
    assert (lin.jacobian().dense() - J).norm() <= 1e-11 * J.norm()
    assert (lin.jacobian().value - y).norm() <= 1e-11 * y.norm()
    with torch.no_grad():
        assert torch.allclose(lin.trace.stock_logits, hf(inputs_embeds=given).logits[0, -1], rtol=1e-12, atol=1e-12)
    certificate = lin.certify()
    assert certificate.passed
    assert certificate.reconstruction_error <= 1e-12
    found = lin.attribute(by="token")
    shares, biases = found.by_token()
    assert sum(shares) + biases == pytest.approx(found.target["value"], rel=1e-11)
    assert lin.tokens[:3] == ["<embedding 0>", "<embedding 1>", "<embedding 2>"]
    assert [group.name for group in find_groups(lin, "word")][:3] == lin.tokens[:3]


def test_the_vectors_of_tokens_give_what_the_tokens_give():
    hf, ids = tiny.gemma3(), tiny.prompt(6)
    with torch.no_grad():
        vectors = hf.get_input_embeddings()(ids)  # with Gemma's scale, as `inputs_embeds` are
    plain, soft = loclin.linearize(wrap(hf), ids), loclin.linearize(wrap(hf), ids[:, 2:], inputs_embeds=vectors[:, :2])
    assert torch.equal(soft.trace.stock_logits, plain.trace.stock_logits)
    assert torch.allclose(soft.jacobian().dense(), plain.jacobian().dense(), rtol=0, atol=1e-12)
    assert not torch.equal(soft.input_ids, plain.input_ids)


def test_analyses_take_vectors_along():
    hf, ids, vectors = tiny.llama(), tiny.prompt(4), VECTORS.to(tiny.DEVICE)
    lin = loclin.linearize(wrap(hf), ids, inputs_embeds=vectors)
    assert lin.logit_lens().layers[-1].words[0][0] == lin.next_tokens(1)[0][0]
    for again in (Nearby(lin).embeddings(lin.embeddings[None]), Nearby(lin).tokens(lin.input_ids)):
        assert torch.equal(again.logits[0], lin.trace.stock_logits)
    assert {ray.position for ray in lin.validity(draws=0, swaps=1, sizes=[1.0], position=3).rays} == {3}
    written = lin.generate(2, k=1)
    with torch.no_grad():
        table = hf.get_input_embeddings()
        longer = [*ids[0].tolist(), written.steps[0].target["id"]]
        given = torch.cat([vectors[None], table(torch.tensor([longer], device=ids.device))], dim=1)
        assert int(hf(inputs_embeds=given).logits[0, -1].argmax()) == written.steps[1].target["id"]
    assert lin.explain(k=1).tokens[0].text == "<embedding 0>"
    assert lin.intervene(["T0", "L1H1"])[0].model != 0
    with pytest.raises(PromptError, match="without images and inputs_embeds"):
        lin.watch(["a"])
    other = loclin.linearize(lin.model, ids)  # another prompt of the same model
    assert torch.equal(other.trace.stock_logits, loclin.linearize(wrap(hf), ids).trace.stock_logits)
    moved = loclin.linearize(wrap(hf), ids, inputs_embeds=2 * vectors)
    assert moved.jacobian().provenance().key() != lin.jacobian().provenance().key()


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bert"])
def test_vectors_of_other_families(family):
    """Also where a network is taken as one block, and where the model scales or adds to what it is given."""
    hf = families.build(family, task="masked" if family == "bert" else "causal")
    vectors = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lin = loclin.linearize(wrap(hf), families.prompt(hf, 4), inputs_embeds=vectors, precision="double")
    assert lin.certify().passed
    assert lin.trace.length == 7


def test_a_network_that_is_one_block_takes_vectors(monkeypatch):
    from loclin.network import sequence

    monkeypatch.setattr(sequence._Watcher, "fallback_reason", lambda _self: "of this test")
    lin = loclin.linearize(wrap(tiny.llama()), tiny.prompt(4), inputs_embeds=VECTORS, precision="double")
    assert lin.trace.n_layers == 1
    assert lin.certify().passed
    assert torch.equal(lin.embeddings[:3], VECTORS)
    assert torch.equal(Nearby(lin).embeddings(lin.embeddings[None]).logits[0], lin.trace.stock_logits)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(3, 23), r"give finite numbers \[n, 24\]"),
        (torch.zeros(2, 3, 24), "give finite numbers"),
        (torch.zeros(0, 24), "give finite numbers"),
        (torch.full((1, 24), torch.nan), "give finite numbers"),
        (torch.zeros(3, 24, dtype=torch.long), "give finite numbers"),
        (torch.zeros(70, 24), "at most 64"),
    ],
)
def test_vectors_that_are_refused(vectors, message):
    with pytest.raises(PromptError, match=message):
        loclin.linearize(wrap(tiny.llama()), tiny.prompt(2), inputs_embeds=vectors)


def test_prompts_that_are_refused():
    model = wrap(tiny.llama())
    with pytest.raises(PromptError, match="there is no prompt"):
        loclin.linearize(model)
    lin = loclin.linearize(model, inputs_embeds=VECTORS)
    with pytest.raises(PromptError, match="from 0 to"):
        loclin.linearize(model, lin.input_ids)
    with pytest.raises(PromptError, match="leave the mask out"):
        loclin.linearize(model, inputs_embeds=VECTORS, attention_mask=[[1, 1, 1]])
    with pytest.raises(OptionError, match="without an encoder"):
        loclin.linearize(wrap(families.build("t5", task="seq2seq")), tiny.prompt(2), inputs_embeds=VECTORS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_prompt_that_peft_has_learned():
    peft = pytest.importorskip("peft")
    hf = tiny.llama()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned, ids = peft.get_peft_model(hf, config).double().eval(), tiny.prompt(4)
    with pytest.raises(ModelError, match="inputs_embeds"):
        wrap(tuned)
    lin = loclin.linearize(wrap(tuned.get_base_model()), ids, inputs_embeds=tuned.get_prompt(1))
    with torch.no_grad():
        stock = tuned(input_ids=ids).logits[0, -1]
    assert torch.allclose(lin.trace.stock_logits, stock, rtol=1e-9, atol=1e-9)
