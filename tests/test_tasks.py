"""Masked models, classifiers and encoder-decoders: their maps against autograd of models with `detach` written in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.activations import GELUActivation
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP
from transformers.models.t5.modeling_t5 import T5LayerNorm

import loclin
import tiny
from loclin.errors import ModelError, OptionError, PromptError
from loclin.models import wrap

V, D, MASK, EOS = 61, 24, 3, 2
_GELU, _SOFTMAX, _TANH = nn.functional.gelu, nn.functional.softmax, torch.tanh
ENCODER = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
    "mask_token_id": MASK,
}
BART = {
    "vocab_size": V,
    "d_model": D,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attn_implementation": "eager",
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
}
T5 = {
    "vocab_size": V,
    "d_model": D,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "attn_implementation": "eager",
    "decoder_start_token_id": 0,
}
WHISPER = BART | {
    "num_mel_bins": 6,
    "max_source_positions": 8,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


def build(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    return tiny._shaken(kind(config), 0, torch.float64)


def modernbert(kind: type[PreTrainedModel], **changes: object) -> PreTrainedModel:
    special = {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    return build(
        kind, ModernBertConfig(**ENCODER, **special, global_attn_every_n_layers=2, local_attention=4, **changes)
    )


def _secant(function):
    return lambda z, *_args, **_kwargs: (function(z) / z).detach() * z


def _layer_norm(x, _shape, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * (x.var(-1, keepdim=True, unbiased=False) + eps).rsqrt().detach()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _t5_norm(self, x):
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt().detach()


def _gated_mlp(self, x):
    gate, up = self.Wi(x).chunk(2, dim=-1)
    return self.Wo(_GELU(gate).detach() * up)


@contextmanager
def detached() -> Iterator[None]:
    """Freeze every coefficient in the model's own code; casts to float32 stay in float64."""
    patches = [
        mock.patch.object(nn.functional, "softmax", lambda x, dim, **_kwargs: _SOFTMAX(x, dim=dim).detach()),
        mock.patch.object(nn.functional, "layer_norm", _layer_norm),
        mock.patch.object(GELUActivation, "forward", lambda _self, z: _secant(_GELU)(z)),
        mock.patch.object(torch, "tanh", _secant(_TANH)),
        mock.patch.object(T5LayerNorm, "forward", _t5_norm),
        mock.patch.object(ModernBertMLP, "forward", _gated_mlp),
        mock.patch.object(Tensor, "float", lambda x: x),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def oracle(hf: PreTrainedModel, x: Tensor, where: list[tuple[nn.Module, bool]], logits) -> tuple[Tensor, Tensor]:
    """J `[V, T, d]` and the logits, row by row, with x `[T, d]` in the place of what enters or leaves some modules.

    `where`: a module, and whether x is what enters it; the calls take as many tokens of x as they have, in order.
    """
    x = x.detach().clone().requires_grad_()
    taken = [0]

    def part(length: int) -> Tensor:
        taken[0] += length
        return x[None, taken[0] - length : taken[0]]

    def leave(_module, _args, output):
        return part(output.shape[1])

    def enter(_module, args, kwargs):
        return (part(args[0].shape[1]), *args[1:]), kwargs

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True) if before else module.register_forward_hook(leave)
        for module, before in where
    ]
    with detached():
        y = logits(hf)
    for handle in handles:
        handle.remove()
    J = torch.stack([torch.autograd.grad(row, x, retain_graph=True)[0] for row in y])
    return J, y.detach()


IDS = torch.tensor([[1, 7, 30, MASK, 12, 55, EOS]])
DECODER = torch.tensor([[EOS, 9, 41]])
FEATURES = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masked(hf):
    return hf(input_ids=IDS).logits[0, 3]


def classes(hf):
    return hf(input_ids=IDS).logits[0]


def translated(hf):
    return hf(input_ids=IDS, decoder_input_ids=DECODER, use_cache=False).logits[0, -1]


def heard(hf):
    return hf(input_features=FEATURES, decoder_input_ids=DECODER, use_cache=False).logits[0, -1]


CASES = {
    "bert, masked": (
        lambda: build(BertForMaskedLM, BertConfig(**ENCODER)),
        lambda hf: [(hf.bert.encoder.layer[0], True)],
        masked,
        {},
        ("masked", 3),
    ),
    "bert, classes": (
        lambda: build(BertForSequenceClassification, BertConfig(**ENCODER, num_labels=3)),
        lambda hf: [(hf.bert.encoder.layer[0], True)],
        classes,
        {},
        ("classification", 0),
    ),
    "modernbert, masked": (
        lambda: modernbert(ModernBertForMaskedLM),
        lambda hf: [(hf.model.layers[0], True)],
        masked,
        {},
        ("masked", 3),
    ),
    "modernbert, classes": (
        lambda: modernbert(ModernBertForSequenceClassification, num_labels=3),
        lambda hf: [(hf.model.layers[0], True)],
        classes,
        {},
        ("classification", 0),
    ),
    "bart, classes": (
        lambda: build(BartForSequenceClassification, BartConfig(**BART)),
        lambda hf: [(hf.model.encoder.embed_tokens, False), (hf.model.decoder.embed_tokens, False)],
        classes,
        {},
        ("classification", 13),
    ),
    "bart": (
        lambda: build(BartForConditionalGeneration, BartConfig(**BART)),
        lambda hf: [(hf.model.encoder.embed_tokens, False), (hf.model.decoder.embed_tokens, False)],
        translated,
        {"decoder": DECODER},
        ("seq2seq", 9),
    ),
    "t5": (
        lambda: build(T5ForConditionalGeneration, T5Config(**T5)),
        lambda hf: [(table, False) for table in {hf.encoder.embed_tokens, hf.decoder.embed_tokens}],
        translated,
        {"decoder": DECODER},
        ("seq2seq", 9),
    ),
    "whisper": (
        lambda: build(WhisperForConditionalGeneration, WhisperConfig(**WHISPER)),
        lambda hf: [(hf.model.decoder.layers[0], True)],
        heard,
        {"inputs": {"input_features": FEATURES}},
        ("seq2seq", 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_map_is_that_of_autograd_with_coefficients_detached(case):
    make, where, logits, more, (task, position) = CASES[case]
    hf = make()
    lin = loclin.linearize(wrap(hf), DECODER if case == "whisper" else IDS, precision="double", **more)
    assert (lin.model.task, lin.trace.sequence.predicts) == (task, position)
    J = lin.jacobian(target="logits")
    expected, y = oracle(hf, lin.embeddings, where(hf), logits)
    assert J.shape == expected.shape
    assert (J.dense() - expected).norm() <= 1e-11 * expected.norm()
    assert (J.value - y).norm() <= 1e-11 * y.norm()
    assert (J.reconstruct() - y).norm() <= 1e-11 * y.norm()
    with torch.no_grad():
        stock = logits(hf)
    assert (stock - y).norm() <= 1e-5 * stock.norm()  # the model casts to float32 inside
    assert lin.certify().passed


@pytest.mark.parametrize(
    ("kind", "position"),
    [(LongformerForMaskedLM, 3), (LongformerForSequenceClassification, 0)],
    ids=["masked", "classes"],
)
def test_windows_that_overlap_in_memory(kind, position):
    """Longformer's attention: strided views of padded chunks; its classes' token attends to all others."""
    hf, ids = build(kind, LongformerConfig(**ENCODER, attention_window=4)), torch.cat([IDS, IDS[:, 1:2]], 1)
    lin = loclin.linearize(wrap(hf), ids, precision="double")
    J = lin.jacobian(target="logits")

    def logits(hf):
        found = hf(input_ids=ids).logits[0]
        return found[position] if found.dim() > 1 else found

    expected, y = oracle(hf, lin.embeddings, [(hf.longformer.encoder.layer[0], True)], logits)
    assert lin.trace.sequence.predicts == position
    assert (J.dense() - expected).norm() <= 1e-11 * expected.norm()
    assert (J.reconstruct() - y).norm() <= 1e-11 * y.norm()


@pytest.mark.parametrize("case", CASES)
def test_shares_by_token_sum_to_the_target(case):
    make, _, _, more, _ = CASES[case]
    lin = loclin.linearize(wrap(make()), DECODER if case == "whisper" else IDS, precision="double", **more)
    found = lin.attribute(by="token")
    shares, biases = found.by_token()
    assert len(shares) == len(lin.tokens)
    assert sum(shares) + biases == pytest.approx(found.target["value"], rel=1e-11)
    J, weights = lin.jacobian(target="logits"), torch.full((lin.jacobian(target="logits").shape[0],), -1.0)
    weights = weights.double() / len(weights)
    weights[found.target["ids"][0]] += 1
    own = torch.einsum("v,vtd,td->t", weights, J.dense(), lin.embeddings)
    assert torch.allclose(torch.tensor(shares, dtype=torch.float64), own, rtol=1e-10, atol=1e-12)


def test_explanations_are_in_classes_and_in_tokens():
    hf = build(BertForSequenceClassification, BertConfig(**ENCODER, id2label={0: "good", 1: "bad", 2: "none"}))
    lin = loclin.linearize(wrap(hf), IDS)
    names = {"good", "bad", "none"}
    assert {name for name, _ in lin.next_tokens(5)} == names
    found = lin.explain(k=2)
    block = found.tokens[1].blocks[0]
    assert {name for name, _ in block.writes} == names
    assert all(name.isdigit() for name, _ in block.reads)
    # a direction at `final` writes what the whole head makes of it, its hidden layer included
    head, direction = lin.jacobian("resid_post.1", "logits").dense()[:, 0], lin.jacobian().svd(1)
    scores = dict(block.writes)
    written = head.double() @ direction.U[1, :, 0].double()
    assert [scores[hf.config.id2label[i]] for i in range(3)] == pytest.approx(written.abs().tolist(), rel=1e-3) or (
        [scores[hf.config.id2label[i]] for i in range(3)] == pytest.approx(written.tolist(), rel=1e-3)
    )
    assert lin.attribute("bad").target["tokens"] == ["bad"]
    with pytest.raises(OptionError, match="good, bad, none"):
        lin.attribute("ugly")


def test_one_class_has_a_logit_and_no_rivals():
    hf = build(BertForSequenceClassification, BertConfig(**ENCODER, num_labels=1))
    lin = loclin.linearize(wrap(hf), IDS)
    assert lin.attribute().target["kind"] == "logit"
    assert "one class" in lin.warnings[0]
    with pytest.raises(OptionError, match="no rivals"):
        lin.attribute(loclin.Margin())


def test_a_decoder_writes_on_token_by_token():
    hf = build(BartForConditionalGeneration, BartConfig(**BART))
    lin = loclin.linearize(wrap(hf), IDS)
    assert lin.input_ids.tolist() == [[*IDS[0].tolist(), EOS]]
    found = lin.generate(3, k=1)
    ids = torch.tensor([[EOS]])
    for step in found.steps:
        with torch.no_grad():
            token = int(hf(input_ids=IDS, decoder_input_ids=ids).logits[0, -1].argmax())
        assert step.target["id"] == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_what_a_task_does_not_have_is_refused_by_name():
    lin = loclin.linearize(wrap(build(BertForMaskedLM, BertConfig(**ENCODER))), IDS)
    for ask in (lin.generate, lin.logit_lens, lin.validity, lin.watch):
        with pytest.raises(ModelError, match="not defined for a masked model"):
            ask(*{lin.generate: (1,), lin.watch: (["a"],)}.get(ask, ()))
    with pytest.raises(ModelError, match="steering is not defined"):
        loclin.steering.Operator.make(lin, 0)
    with pytest.raises(ModelError, match="a padded batch is not defined"):
        loclin.linearize_batch(lin.model, [IDS])
    with pytest.raises(OptionError, match="no decoder"):
        loclin.linearize(lin.model, IDS, decoder=DECODER)
    with pytest.raises(OptionError, match="for other tasks"):
        loclin.linearize(tiny.llama(), tiny.prompt(4), decoder=DECODER)


def test_positions_that_have_no_map_are_refused():
    lin = loclin.linearize(wrap(build(T5ForConditionalGeneration, T5Config(**T5))), IDS, decoder=DECODER)
    assert lin.jacobian(position=7).position == 7
    with pytest.raises(PromptError, match="a token of the encoder"):
        lin.jacobian(position=2)
    lin = loclin.linearize(wrap(build(BertForSequenceClassification, BertConfig(**ENCODER))), IDS)
    with pytest.raises(PromptError, match="the classes read the token at position 0"):
        lin.next_tokens(position=2)


def test_classes_that_read_several_tokens_are_refused():
    hf = modernbert(ModernBertForSequenceClassification, classifier_pooling="mean")
    with pytest.raises(ModelError, match="hidden states of 7 tokens"):
        loclin.linearize(wrap(hf), IDS)


def test_what_the_encoder_of_sound_reads_is_given():
    model = wrap(build(WhisperForConditionalGeneration, WhisperConfig(**WHISPER)))
    with pytest.raises(PromptError, match="input_features"):
        loclin.linearize(model, DECODER)
    with pytest.raises(OptionError, match="takes beside tokens"):
        loclin.linearize(model, DECODER, inputs={"nonsense": FEATURES})


def test_segments_of_a_pair_of_texts_are_those_given():
    hf = build(BertForMaskedLM, BertConfig(**ENCODER))
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    lin = loclin.linearize(wrap(hf), {"input_ids": IDS, "token_type_ids": types}, precision="double")
    with torch.no_grad():
        stock = hf(input_ids=IDS, token_type_ids=types).logits[0, 3]
    assert (lin.jacobian(target="logits").reconstruct() - stock).norm() <= 1e-11 * stock.norm()
    assert not torch.equal(lin.trace.stock_logits, loclin.linearize(wrap(hf), IDS).trace.stock_logits)


def test_a_prompt_without_a_mask_says_so():
    lin = loclin.linearize(wrap(build(BertForMaskedLM, BertConfig(**ENCODER))), torch.tensor([[5, 6, 7]]))
    assert lin.jacobian().position == 2
    assert "no mask token" in lin.warnings[0]
