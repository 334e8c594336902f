"""What can be shared out, and what cannot."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.analyses.attribution.result import KINDS
from loclin.analyses.attribution.target import Direction, Margin, Neuron
from loclin.errors import OptionError, PromptError
from loclin.linearization import Linearization, linearize
from loclin.models import tiny as families


@pytest.fixture(params=["llama", "gemma2", "gpt2", "phi"])
def lin(request) -> Linearization:
    model = families.build(request.param)
    return linearize(model, families.prompt(model), precision="double")


def test_the_default_is_the_predicted_token(lin):
    found, (id_, text, probability) = lin.attribute(), lin.next_token_ids(1)[0]
    assert (found.target["ids"], found.target["tokens"]) == ([id_], [text])
    assert found.target["probability"] == pytest.approx(probability)
    logits = lin.value("logits")[-1]
    assert found.value == pytest.approx((logits.max() - logits.mean()).item())


@pytest.mark.parametrize("by", ["token", "head"])
def test_differences_are_differences(lin, by):
    one, other, both = (lin.attribute(target, by=by, in_words=0) for target in (3, 9, (3, 9)))
    assert both.value == pytest.approx(one.value - other.value)
    named = {p.name + str(p.token): p.share for p in one.parts}
    for p in other.parts:
        named[p.name + str(p.token)] = named.get(p.name + str(p.token), 0.0) - p.share
    assert {p.name + str(p.token): p.share for p in both.parts} == pytest.approx(named, abs=1e-11)


def test_margins(lin):
    logits = lin.value("logits")[-1]
    best, second = logits.topk(2)
    runner_up = lin.attribute(Margin())
    assert runner_up.value == pytest.approx((best[0] - best[1]).item())
    assert runner_up.target["ids"] == second.tolist()
    others = logits.clone()
    others[4] = -torch.inf
    entropy = torch.distributions.Categorical(logits=others).entropy()
    p = logits.softmax(0)[4]
    over = lin.attribute(Margin(4, "others"))
    assert over.value == pytest.approx((torch.log(p / (1 - p)) + entropy).item())
    for found in (runner_up, over, lin.attribute(Margin(4), by="layer")):
        assert found.relative_residual < 1e-12


@pytest.mark.slow
def test_directions(lin):
    u = torch.randn(lin.trace.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for point in ("final", "resid_post.1", "resid_mid.1", "resid_pre.1", "embed"):
        for by in ("token", "layer", "head", "token×layer"):
            found = lin.attribute(Direction(u, at=point), by=by, position=3)
            assert found.value == pytest.approx((u @ lin.value(point)[3]).item(), rel=1e-9)
            assert found.relative_residual < 1e-12
            limit = {"resid_post.1": 1, "resid_mid.1": 1, "resid_pre.1": 0, "embed": -1}.get(point, 99)
            assert found.layers.max() <= limit
    assert torch.equal(lin.attribute(u).shares, lin.attribute(Direction(u)).shares)


def test_neurons(lin):
    """A neuron's activation is the model's own, at any layer."""
    seen = {}
    block = lin.trace.layers[1].block
    last = {"llama": "mlp.down_proj", "gemma2": "mlp.down_proj", "gpt2": "mlp.c_proj", "phi": "mlp.fc2"}
    module = block.module.get_submodule(last[lin.model.info.family])
    handle = module.register_forward_pre_hook(lambda _m, args: seen.update(act=args[0]))
    lin.trace.model.hf(input_ids=lin.input_ids)
    handle.remove()
    for by in ("token", "layer", "head", "neuron", "token×layer", "bias"):
        found = lin.attribute(Neuron(7, layer=1), by=by, position=4)
        assert found.value == pytest.approx(seen["act"].reshape(7, -1)[4, 7].item(), rel=tiny.rounding())
        assert found.relative_residual < 1e-12
        assert found.layers.max() <= 1
    assert found.target["kind"] == "neuron L1N7"


@pytest.fixture(scope="module")
def llama() -> Linearization:
    return linearize(tiny.llama(), tiny.prompt(5))


@pytest.mark.parametrize(
    ("target", "by", "message"),
    [
        (None, "sideways", "by='sideways': choose one of token, layer, head, neuron, bias, token×layer"),
        (61, "token", "the model's tokens are 0 to 60"),
        (-1, "token", "the model's tokens are 0 to 60"),
        (" Bridge", "token", "has no tokenizer; give the token's id"),
        (torch.zeros(5), "token", "a direction at final has 24 numbers, not [5]"),
        (Direction(torch.zeros(24), at="attn_out.1"), "token", "a point on the residual stream"),
        (Direction(torch.zeros(24), at="resid_post.3"), "token", "the model has layers 0 to 2"),
        (Neuron(3, layer=7), "token", "the model has layers 0 to 2"),
        (Neuron(40), "token", "layer 2 has neurons 0 to 39"),
    ],
)
def test_mistakes_are_refused(llama, target, by, message):
    with pytest.raises(OptionError) as refused:
        llama.attribute(target, by=by)
    assert message in str(refused.value)


def test_positions_outside_the_prompt(llama):
    with pytest.raises(PromptError, match="position 5 is outside the prompt"):
        llama.attribute(position=5)


def test_unknown_rivals():
    with pytest.raises(OptionError, match="runner-up, others"):
        Margin(over="all")


def test_experts_have_no_neurons_of_the_layer():
    model = families.build("deepseek_v3")
    lin = linearize(model, families.prompt(model), precision="double")
    found = lin.attribute(by="neuron")
    assert set(found.layers[found.kinds == KINDS.index("neuron")].tolist()) == {0}
    (note,) = found.warnings
    assert "mlp (DeepseekV3MoE) has no single output projection" in note
    with pytest.raises(OptionError, match="layer 1: mlp .DeepseekV3MoE. has no single output projection"):
        lin.attribute(Neuron(0, layer=1))


def test_where_there_are_no_layers():
    model = families.build("gemma4_text")
    lin = linearize(model, families.prompt(model), precision="double")
    assert lin.attribute().relative_residual < 1e-12
    with pytest.raises(OptionError, match="no layers to tell apart: .*by='token' or by='bias'"):
        lin.attribute(by="head")
