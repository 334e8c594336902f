"""Why a head attends there: scores by hand, and shares of either side that sum to them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

import oracle
import tiny
from loclin.analyses.attribution.target import Score
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.network.memory import Allowance

BUILDS = {"llama": lambda **kw: tiny.llama(biases=True, **kw), "gemma3": tiny.gemma3}


def by_hand(model, ids, layer, head, query, key, live):
    """The score from the model's own modules, and what each embedding gives of it with the other side detached."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    decoder, own = model.model, model.model.layers[layer]
    attention = own.self_attn
    with oracle.detached():
        states = decoder(inputs_embeds=x, use_cache=False, output_hidden_states=True).hidden_states[layer]
        h = own.input_layernorm(states)
        q, k = (
            project(h).view(1, len(ids[0]), -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        places = torch.arange(len(ids[0]))[None]
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
            turn = decoder.rotary_emb(h, places, model.config.layer_types[layer])
        else:
            turn = decoder.rotary_emb(h, places)
        home = modeling_gemma3 if hasattr(attention, "q_norm") else modeling_llama
        q, k = home.apply_rotary_pos_emb(q, k, *turn)
    q, k = (q, k.detach()) if live == "query" else (q.detach(), k)
    score = q[0, head, query] @ k[0, head // attention.num_key_value_groups, key] * attention.scaling
    (g,) = torch.autograd.grad(score, x)
    return score.item(), (g * x).sum(-1)[0].tolist()


@pytest.mark.parametrize(("name", "attn"), [("llama", "eager"), ("llama", "sdpa"), ("gemma3", "sdpa")])
def test_shares_are_those_by_hand(name, attn):
    ids, build = tiny.prompt(6), BUILDS[name]
    lin, slow = linearize(build(attn=attn), ids, precision="double"), build(attn="eager")
    for layer, head, query, key in ((1, 2, 4, 1), (2, 3, 5, 5)):
        found = lin.attention_score(f"L{layer}H{head}", query=query, key=key)
        for side, shares in (("query", found.by_query), ("key", found.by_key)):
            score, expected = by_hand(slow, ids, layer, head, query, key, side)
            given, _ = shares.by_token()
            assert found.score == pytest.approx(score, rel=1e-9)  # tables of rotations are in float32
            assert given == pytest.approx(expected, rel=1e-9, abs=1e-11)
            assert shares.value == found.score
            assert shares.relative_residual < 1e-12


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt2", "gpt_oss", "opt", "qwen3"])
def test_scores_are_the_log_of_the_attention_up_to_a_shift(family):
    """With rotations, norms of queries and keys, soft caps, biases for distance and sinks, in either attention."""
    model = families.build(family)
    lin = linearize(model, families.prompt(model), precision="double")
    with torch.no_grad():
        kept = families.build(family, attn="eager")(input_ids=lin.input_ids, output_attentions=True).attentions
    a, b = (lin.attention_score("L1H1", query=5, key=key, by="layer") for key in (3, 5))
    row = kept[1][0, 1, 5].double()
    assert a.score - b.score == pytest.approx((row[3] / row[5]).log().item(), rel=1e-5, abs=1e-5)
    assert a.probability == pytest.approx(row[3].item(), rel=1e-5)
    for found in (a, b):
        assert found.by_query.value == found.by_key.value == found.score
        for shares in (found.by_query, found.by_key):
            assert shares.relative_residual < 1e-12
            assert shares.layers.max() < 1


@pytest.mark.parametrize("by", ["head", "neuron", "bias", "token×layer", {"two": [0, 3]}])
def test_every_level_sums_to_the_score(by):
    lin = linearize(tiny.llama(biases=True), tiny.prompt(6), precision="double")
    found = lin.attention_score("L-1H-1", key=2, by=by)
    assert (found.name, found.query, found.key) == ("L2H3", 5, 2)
    for shares in (found.by_query, found.by_key):
        assert shares.relative_residual < 1e-12
        assert shares.value == found.score
    assert lin.attribute(Score("L2H3", 2, "key"), by=by).shares.tolist() == found.by_key.shares.tolist()
    assert len(found.table()["share"]) == len(found.by_query) + len(found.by_key)
    assert json.loads(found.to_json())["probability"] == found.probability


def test_the_default_key_is_the_most_attended_word():
    lin = linearize(tiny.llama(), tiny.prompt(6), precision="double")
    for head in range(4):
        found = lin.attention_score(f"L1H{head}")
        words = [p for i, p in enumerate(found.pattern.tolist()) if i not in lin.non_words]
        assert found.probability == max(words)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_in_the_models_own_precision(dtype, limit):
    lin = linearize(tiny.gemma3(dtype=dtype), tiny.prompt(6))
    for by in ("token", "layer"):
        found = lin.attention_score("L1H2", key=2, by=by)
        assert max(found.by_query.relative_residual, found.by_key.relative_residual) < limit


def test_of_a_long_prompt_whose_attention_is_in_blocks(monkeypatch):
    whole = linearize(tiny.gemma3(), tiny.prompt(12), precision="double")
    monkeypatch.setattr(Allowance, "pattern", 0)
    lin = linearize(tiny.gemma3(), tiny.prompt(12), precision="double")
    assert lin.trace.attention_bytes == 0
    a, b = (one.attention_score("L1H2", key=9) for one in (lin, whole))
    assert a.score == pytest.approx(b.score, rel=1e-12)
    assert a.by_key.shares.tolist() == pytest.approx(b.by_key.shares.tolist(), rel=1e-9, abs=1e-12)


def test_mistakes():
    lin = linearize(tiny.gemma3(), tiny.prompt(6), precision="double")
    for wrong, message in (
        ("L1H4", "layer 1 has query heads 0 to 3"),
        ("L3H0", "layers 0 to 2"),
        ("attn_out.1", "write L3H5"),
        ("L1H0@2", "write L3H5"),
    ):
        with pytest.raises(OptionError, match=message):
            lin.attention_score(wrong)
    with pytest.raises(OptionError, match="L1H0: the token at 2 may not attend to that at 4"):
        lin.attention_score("L1H0", query=2, key=4)
    with pytest.raises(OptionError, match="L0H0: the token at 5 may not attend to that at 1"):
        lin.attention_score("L0H0", key=1)  # a sliding window
    with pytest.raises(PromptError, match="position 6 is outside"):
        lin.attention_score("L1H0", key=6)
    with pytest.raises(OptionError, match="side='value': choose one of query, key"):
        Score("L1H0", side="value")


@pytest.mark.parametrize(
    ("family", "task", "named"),
    [
        ("mamba", "causal", r"mixer \(MambaMixer\) has no attention heads"),
        ("deepseek_v3", "causal", r"self_attn \(DeepseekV3Attention\) are not the product of a query and a key"),
        ("t5", "seq2seq", "has no layers to tell apart"),
    ],
)
def test_what_has_no_scores_is_refused_by_name(family, task, named):
    model = families.build(family, task=task)
    lin = linearize(model, families.prompt(model), precision="double")
    with pytest.raises(OptionError, match=named):
        lin.attention_score("L0H0", key=0)
