"""Shares by adapter: against a Llama written by hand, whose coefficients are held while adapters are switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny
from loclin.analyses.attribution.result import Attribution
from loclin.analyses.attribution.target import LogProb, Neuron
from loclin.errors import NotExactError, OptionError
from loclin.linearization import linearize
from loclin.models import tiny as families

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft asks transformers
IDS = tiny.prompt(6)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_ORDER = [
    f"L{i}.{name}"
    for i in range(3)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
"""The adapters that a frozen Llama has on its linear path, from the embeddings on."""


def adapted(model=None, kind="LoraConfig", **changes):
    """A model with an adapter that matters, by PEFT."""
    torch.manual_seed(0)
    how = (
        {"target_modules": ALL, "init_lora_weights": False} if kind == "LoraConfig" else {"target_modules": ["up_proj"]}
    )
    config = getattr(peft, kind)(**how | ({"r": 3, "lora_alpha": 5} if kind == "LoraConfig" else {}) | changes)
    return peft.get_peft_model(tiny.llama(biases=True) if model is None else model, config).double().eval()


def run(model, held=None, on=None):
    """The adapted Llama by hand, in float64: its logits and its coefficients; `held`, with those of another run.

    `on` are the adapters that are not switched off; None: none is.
    """
    base, length, used = model.get_base_model().model, IDS.shape[1], []
    config, known = model.config, iter(held or [])

    def coefficient(make):
        used.append(next(known) if held else make())
        return used[-1]

    def apply(i, path, x):
        module = base.layers[i].get_submodule(path)
        y = linear(x, module.base_layer.weight, module.base_layer.bias)
        if on is None or f"L{i}.{path}" in on:
            for name in module.active_adapters:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                y = y + module.scaling[name] * linear(linear(x, a), b)
        return y

    def norm(module, x):
        scale = coefficient(lambda: (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt())
        return x * scale * module.weight

    def heads(x):
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def pattern(i, h):
        query, key = (heads(apply(i, f"self_attn.{name}", h)) for name in ("q_proj", "k_proj"))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        scores = query @ key.repeat_interleave(2, 1).mT * config.head_dim**-0.5
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, -torch.inf).softmax(-1)

    x = base.embed_tokens(IDS)
    cos, sin = base.rotary_emb(x, torch.arange(length)[None])
    for i, layer in enumerate(base.layers):
        h = norm(layer.input_layernorm, x)
        probs = coefficient(lambda i=i, h=h: pattern(i, h))
        mixed = probs @ heads(apply(i, "self_attn.v_proj", h)).repeat_interleave(2, 1)
        x = x + apply(i, "self_attn.o_proj", mixed.transpose(1, 2).flatten(2))
        h = norm(layer.post_attention_layernorm, x)
        gate = coefficient(lambda i=i, h=h: silu(apply(i, "mlp.gate_proj", h)))
        x = x + apply(i, "mlp.down_proj", gate * apply(i, "mlp.up_proj", h))
    return model.get_base_model().lm_head(norm(base.norm, x))[0], used


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(scope="module")
def lin(model):
    return linearize(model, IDS, precision="double")


@pytest.mark.parametrize("position", [-1, 3])
def test_shares_are_those_of_a_model_whose_adapters_are_switched_on_one_by_one(model, lin, position):
    with torch.no_grad():
        whole, held = run(model)
        steps = [run(model, held, IN_ORDER[:count])[0][position, 5].item() for count in range(len(IN_ORDER) + 1)]
    found = lin.attribute(5, by="adapter", position=position)
    assert found.value == pytest.approx(whole[position, 5].item(), abs=1e-11)
    shares = {part.name: part.share for part in found.parts if part.kind == "adapter"}
    for name, before, after in zip(IN_ORDER, steps, steps[1:], strict=False):
        assert shares.pop(name) == pytest.approx(after - before, abs=1e-11)
    assert set(shares.values()) == {0}  # queries, keys and gates
    without = sum(part.share for part in found.parts if part.kind != "adapter")
    assert without == pytest.approx(steps[0], abs=1e-11)
    assert abs(steps[0] - steps[-1]) > 0.1
    assert {part.layer for part in found.parts if part.kind == "adapter"} == {0, 1, 2}


def test_what_has_no_share_is_said(lin):
    (note,) = [text for text in lin.attribute(5, by="adapter").warnings if "no share" in text]
    assert "self_attn.q_proj, self_attn.k_proj, mlp.gate_proj act" in note
    live = linearize(lin.model, IDS, precision="double", gate="half").attribute(5, by="adapter")
    assert "q_proj, self_attn.k_proj act" in "".join(live.warnings)
    assert all(part.share for part in live.parts if part.name.endswith("gate_proj"))
    assert live.relative_residual < 1e-12


@pytest.mark.parametrize("target", [None, LogProb(5), [5, 9], ([5, 9], [7, 8, 4])])
def test_targets(lin, target, tmp_path):
    found = lin.attribute(target, by="adapter")
    assert found.relative_residual < 1e-12
    found.save(tmp_path / "a.json")
    assert Attribution.load(tmp_path / "a.json").to_dict() == found.to_dict()
    assert [part.name for part in found.parts if part.kind == "adapter"][2] == "L0.self_attn.v_proj"


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi"])
def test_other_families(family):
    """Modules by other names, a Conv1D, norms behind them, parallel layers."""
    model = families.build(family)
    names = {"gpt2": ["c_attn", "c_fc", "c_proj"], "phi": ["v_proj", "dense", "fc1", "fc2"]}.get(family, ALL)
    config = {"target_modules": names, "fan_in_fan_out": family == "gpt2"}
    lin = linearize(adapted(model, **config), families.prompt(model), precision="double")
    found = lin.attribute(5, by="adapter")
    assert found.relative_residual < 1e-12
    assert sum(bool(part.share) for part in found.parts if part.kind == "adapter") >= 2


def test_other_adapters():
    dora = linearize(adapted(use_dora=True), IDS, precision="double").attribute(5, by="adapter")
    assert dora.relative_residual < 1e-12
    two = adapted(target_modules=["up_proj"])
    two.add_adapter("second", peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    two.base_model.set_adapter(["default", "second"])
    found = linearize(two.double(), IDS, precision="double").attribute(5, by="adapter")
    assert [part.name for part in found.parts if part.share and part.kind == "adapter"] == [
        f"L{i}.mlp.{name}" for i in range(3) for name in ("up_proj", "down_proj")
    ]
    assert found.relative_residual < 1e-12


def test_in_single_precision():
    found = linearize(adapted().float(), IDS).attribute(5, by="adapter")
    wide = linearize(adapted(), IDS, precision="double").attribute(5, by="adapter")
    assert found.relative_residual < 1e-6
    assert (found.shares - wide.shares).abs().max() < tiny.rounding() * wide.shares.abs().sum()


def test_what_is_trained_beside_the_layers_is_said():
    found = linearize(adapted(target_modules=["up_proj", "lm_head"]), IDS, precision="double").attribute(
        5, by="adapter"
    )
    assert "What was trained at lm_head counts with the model" in "".join(found.warnings)
    assert found.relative_residual < 1e-12


def test_nothing_of_it_is_in_other_levels(lin, model):
    before = lin.attribute(5).shares
    lin.attribute(5, by="adapter")
    assert torch.equal(lin.attribute(5).shares, before)
    merged = linearize(copy.deepcopy(model).merge_and_unload(), IDS, precision="double")
    assert (merged.attribute(5).shares - before).abs().max() < 1e-10


def test_mistakes(lin, model):
    with pytest.raises(OptionError, match="has no active adapter"):
        linearize(tiny.llama(), IDS).attribute(5, by="adapter")
    with model.disable_adapter(), pytest.raises(OptionError, match="has no active adapter"):
        linearize(model, IDS).attribute(5, by="adapter")
    with pytest.raises(OptionError, match="a neuron reads adapters"):
        lin.attribute(Neuron(3, 1), by="adapter")
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(OptionError, match="unmerge it first"):
        linearize(merged, IDS).attribute(5, by="adapter")
    turned = linearize(adapted(kind="OFTConfig", oft_block_size=4, init_weights=False), IDS, precision="double")
    with pytest.raises(NotExactError, match="changes what enters the module"):
        turned.attribute(5, by="adapter")
