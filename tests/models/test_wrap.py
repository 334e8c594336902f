"""Wrapping a model someone loaded: what is refused, and that the rest is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

from loclin.errors import ModelError
from loclin.models import wrap

from .helpers import tiny_llama, tiny_tokenizer

BERT = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_a_wrapped_model_is_left_as_it_was():
    hf = tiny_llama(attention_dropout=0.25).train().to(torch.bfloat16)
    hf.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(hf.state_dict())
    config = hf.config.to_dict()

    model = wrap(hf, tiny_tokenizer(), name="mine")

    assert model.hf is hf
    assert hf.training
    assert not hf.model.norm.weight.requires_grad
    assert hf.lm_head.weight.requires_grad
    assert hf.config.to_dict() == config
    assert before.keys() == hf.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


def test_info_says_what_the_model_is():
    hf = tiny_llama().to(torch.float64)
    model = wrap(hf, name="mine")
    info = model.info.to_dict()
    assert info == {
        "name": "mine",
        "source": "wrapped",
        "family": "llama",
        "revision": None,
        "sha256": None,
        "stored_dtype": "float64",
        "dtype": "float64",
        "n_parameters": sum({id(p): p.numel() for p in hf.parameters()}.values()),
        "task": "causal",
    }
    assert model.context_length == 16
    assert model.tokenizer is None
    assert model.bos is None
    assert model.device == torch.device("cpu")
    assert "mine" in repr(model)
    assert "llama" in repr(model)


def test_tied_weights_count_once():
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    more = wrap(untied).info.n_parameters - wrap(tied).info.n_parameters
    assert more == tied.lm_head.weight.numel()


def test_gpt2_names_its_context_differently_and_is_understood():
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=12, n_embd=8, n_layer=1, n_head=2))
    assert wrap(hf).context_length == 12


def test_an_encoder_is_refused_as_a_causal_model():
    with pytest.raises(ModelError, match="encoder"):
        wrap(BertLMHeadModel(BertConfig(**BERT)))


def test_the_class_says_what_a_model_predicts():
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    tasks = {
        "masked": BertForMaskedLM(BertConfig(**BERT)),
        "classification": BertForSequenceClassification(BertConfig(**BERT)),
        "seq2seq": T5ForConditionalGeneration(t5),
        "causal": tiny_llama(),
    }
    assert {task: wrap(hf).task for task, hf in tasks.items()} == {task: task for task in tasks}


@pytest.mark.parametrize(("causal", "task"), [(True, "causal"), (False, "masked")])
def test_a_class_for_two_tasks_is_told_by_its_config(causal, task):
    config = XLMConfig(vocab_size=16, emb_dim=8, n_layers=1, n_heads=2, causal=causal)
    assert wrap(XLMWithLMHeadModel(config)).task == task


def test_a_bert_trained_as_a_decoder_is_taken():
    assert wrap(BertLMHeadModel(BertConfig(**BERT, is_decoder=True))).info.family == "bert"


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no output head"):
        wrap(LlamaModel(tiny_llama().config))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "gemma-3-270m", None])
def test_what_is_not_a_transformers_model_is_refused(thing):
    with pytest.raises(ModelError, match=type(thing).__name__):
        wrap(thing)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_with_holes_are_refused_by_name(value, dtype):
    hf = tiny_llama().to(dtype)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight;"):
        wrap(hf)


def test_opposite_infinities_do_not_cancel():
    hf = tiny_llama()
    with torch.no_grad():
        hf.model.norm.weight[:2] = torch.tensor([float("inf"), float("-inf")])
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        wrap(hf)


def test_only_the_first_few_broken_weights_are_named():
    hf = tiny_llama()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.fill_(float("nan"))
    n = len(list(hf.parameters()))
    with pytest.raises(ModelError, match=f"model.embed_tokens.weight, .* and {n - 3} more"):
        wrap(hf)


def test_finite_weights_whose_sum_overflows_are_taken():
    hf = tiny_llama().to(torch.float16)
    with torch.no_grad():
        hf.model.norm.weight.fill_(60000.0)
    assert not hf.model.norm.weight.sum().isfinite()
    assert wrap(hf).info.dtype == "float16"


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        hf = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ModelError, match=r"meta device\): model\.embed_tokens\.weight"):
        wrap(hf)


def test_a_model_offloaded_by_accelerate_is_taken(tmp_path):
    hf = tiny_llama()
    hf.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    model = wrap(offloaded, tiny_tokenizer())
    ids = model.encode("the cat")
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, hf.eval()(ids).logits)
