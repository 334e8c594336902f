"""Attention shared among queries, keys and values, against the same rules written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

import loclin
import tiny
from loclin import SharedAttention
from loclin.analyses.attribution.result import Attribution
from loclin.errors import ModelError, OptionError
from loclin.models import tiny as families

IDS = tiny.prompt(7)
WEIGHTS = SharedAttention(query=0.2, key=0.3, value=0.6)


def watch(model, names):
    """What some modules are given and give, by name, in one forward pass of the model."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, output, name=name: seen.__setitem__(name, (args[0] if args else None, output))
        )
        for name in names
    ]
    with torch.no_grad():
        seen["embeddings"] = model.get_input_embeddings()(IDS)[0]
        rotary = model.model.rotary_emb(seen["embeddings"], torch.arange(IDS.shape[1])[None])
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen, rotary


def by_hand(model, token, weights):
    """Relevance of each token in a Llama: norms frozen, half of each gate, and attention's softmax by its Jacobian."""
    config, layers = model.config, model.model.layers
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{i}.{part}" for i in range(len(layers)) for part in (*parts, *norms)]
    seen, (cos, sin) = watch(model, [*names, "model.norm"])

    def gain(name):
        module = model.get_submodule(name)
        x = seen[name][0][0]
        return module.weight * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    def split(vectors, n):
        return vectors[0].view(-1, n, size).transpose(0, 1)

    T = IDS.shape[1]
    back = torch.zeros(T, config.hidden_size, dtype=torch.float64)
    back[-1] = model.lm_head.weight[token] * gain("model.norm")[-1]
    for i in reversed(range(len(layers))):
        own, layer = f"model.layers.{i}.", layers[i]
        gate, up = (seen[f"{own}mlp.{name}"][1][0] for name in ("gate_proj", "up_proj"))
        inner = back @ layer.mlp.down_proj.weight
        by_up = (inner * gate * gate.sigmoid()) @ layer.mlp.up_proj.weight
        by_gate = (inner * gate.sigmoid() * up) @ layer.mlp.gate_proj.weight
        back = back + 0.5 * (by_up + by_gate) * gain(f"{own}post_attention_layernorm")
        q, k, v = (split(seen[f"{own}self_attn.{name}_proj"][1], n) for name, n in (("q", heads), ("k", kv), ("v", kv)))
        q, k = (each[0] for each in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        k, v = (each.repeat_interleave(heads // kv, 0) for each in (k, v))
        scores = (q @ k.mT / math.sqrt(size)).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        P = scores.softmax(-1)
        inner = (back @ layer.self_attn.o_proj.weight).view(T, heads, size).transpose(0, 1)
        to_v = P.mT @ inner
        to_p = inner @ v.mT
        to_scores = P * (to_p - (P * to_p).sum(-1, keepdim=True)) / math.sqrt(size)
        to_q, to_k = to_scores @ k, to_scores.mT @ q
        to_q, to_k = (each * cos - rotate_half(each * sin) for each in (to_q, to_k))
        new = torch.zeros_like(back)
        for pulled, name, n, weight in (
            (to_q, "q", heads, weights.query),
            (to_k, "k", kv, weights.key),
            (to_v, "v", kv, weights.value),
        ):
            grouped = pulled.view(n, heads // n, T, size).sum(1).transpose(0, 1).reshape(T, n * size)
            new += weight * grouped @ layer.self_attn.get_submodule(f"{name}_proj").weight
        back = back + new * gain(f"{own}input_layernorm")
    return (back * seen["embeddings"]).sum(-1).detach()


@pytest.mark.parametrize("weights", [SharedAttention(), WEIGHTS], ids=["the default", "others"])
def test_shares_are_those_of_the_rules_by_hand(weights):
    model = tiny.llama()
    found = loclin.linearize(model, IDS, gate="half").attribute(5, attention=weights)
    expected = by_hand(model, 5, weights)
    # this family's norms and rotations are in float32, whatever the model's dtype
    assert (found.shares - expected).abs().max() < tiny.rounding() * expected.abs().sum()


def test_with_all_relevance_through_values_they_are_the_exact_shares():
    for model in (tiny.llama(biases=True), tiny.gemma3(), families.build("gpt2")):
        lin = loclin.linearize(model, IDS)
        exact, found = lin.attribute(5), lin.attribute(5, attention=SharedAttention(0, 0, 1))
        assert [part.name for part in found.parts] == [part.name for part in exact.parts]
        assert torch.allclose(
            found.shares, exact.shares, rtol=0, atol=tiny.rounding() * exact.shares.abs().sum().item()
        )


def test_the_result_says_that_it_is_not_exact(tmp_path):
    lin = loclin.linearize(tiny.llama(), IDS)
    found = lin.attribute(5, attention="shared")
    (warning,) = found.warnings
    assert "not exact" in warning
    assert f"{found.residual:+.4g}" in warning
    assert abs(found.residual) > 1e-3 * abs(found.value)
    assert found.shared == {"query": 0.25, "key": 0.25, "value": 0.5}
    found.save(tmp_path / "shared.json")
    assert Attribution.load(tmp_path / "shared.json").shared == found.shared
    assert lin.attribute(5).shared is None
    assert lin.certify().passed


def test_what_cannot_be_shared_is_refused():
    lin = loclin.linearize(tiny.llama(), IDS)
    with pytest.raises(OptionError, match="by='layer'"):
        lin.attribute(5, by="layer", attention="shared")
    with pytest.raises(OptionError, match="choose frozen, shared"):
        lin.attribute(5, attention="all")
    with pytest.raises(OptionError, match="from 0 to 1"):
        SharedAttention(query=2)
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        loclin.linearize(tiny.llama(attn="eager"), IDS).attribute(5, attention="shared")
