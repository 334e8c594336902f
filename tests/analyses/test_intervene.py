"""Interventions: the frozen change is a share, and the model's is that of a model whose weights were edited."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import tiny
from loclin.analyses.attribution.target import Direction, Entropy, LogProb, Margin, Neuron, Span
from loclin.analyses.intervene import Interventions
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families

IDS = tiny.prompt(6)


@pytest.fixture(scope="module")
def lin():
    return linearize(tiny.llama(biases=True), IDS, precision="double")


def edited(lin, edit):
    """The logits of a copy of the model whose weights were edited."""
    model = copy.deepcopy(lin.model.hf)
    with torch.no_grad():
        edit(model.model.layers)
        return model(IDS).logits[0]


def without_head(layers):
    d_head = layers[1].self_attn.head_dim
    layers[1].self_attn.o_proj.weight[:, 2 * d_head : 3 * d_head] = 0


def without_neuron(layers):
    layers[0].mlp.down_proj.weight[:, 7] = 0


def without_attention(layers, at=2):
    layers[at].self_attn.o_proj.weight.zero_()
    layers[at].self_attn.o_proj.bias.zero_()


def without_mlp(layers):
    layers[1].mlp.down_proj.weight.zero_()
    layers[1].mlp.down_proj.bias.zero_()


@pytest.mark.parametrize(
    ("name", "edit", "by"),
    [
        ("L1H2", without_head, "head"),
        ("L0N7", without_neuron, "neuron"),
        ("attn_out.2", without_attention, "layer"),
        ("mlp_out.-2", without_mlp, "layer"),
    ],
)
@pytest.mark.parametrize("position", [-1, 3])
def test_a_knock_out(lin, name, edit, by, position):
    found = lin.intervene(name, target=5, position=position)
    expected = edited(lin, edit)[position]
    assert found[0].model == pytest.approx((expected[5] - lin.model.hf(IDS).logits[0, position, 5]).item(), abs=1e-12)
    assert found[0].probability == pytest.approx(expected.softmax(0).max().item())
    (part,) = (p for p in lin.attribute(5, by=by, position=position, in_words=0).parts if p.name == found[0].name)
    assert found[0].frozen == pytest.approx(-part.through, abs=1e-12)


def test_a_token(lin):
    embeddings = lin.embeddings.clone()
    embeddings[2] = embeddings.mean(0)
    expected = lin.model.hf(inputs_embeds=embeddings[None]).logits[0, -1]
    found = lin.intervene("T2", "mean", target=LogProb(9))
    logits = lin.model.hf(IDS).logits[0, -1]
    assert found[0].model == pytest.approx((expected.log_softmax(0)[9] - logits.log_softmax(0)[9]).item(), abs=1e-12)
    J = lin.jacobian(target="logits").dense()[:, 2]
    weights = torch.eye(len(logits), dtype=J.dtype)[9] - lin.value("logits")[-1].softmax(0)
    assert found[0].frozen == pytest.approx((weights @ J @ (embeddings[2] - lin.embeddings[2])).item(), abs=1e-11)


@pytest.mark.parametrize("point", ["resid_pre.1", "resid_post.1"])
def test_a_direction(lin, point):
    v = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = lin.intervene(Direction(v, at=point), target=5, at=[1, 4]).effects
    unit = v / v.norm()

    def change(_module, args, output=None):
        h = (args[0] if output is None else output).clone()
        h[0, [1, 4]] -= (h[0, [1, 4]] @ unit)[:, None] * unit
        return (h, *args[1:]) if output is None else h

    layer = lin.model.hf.model.layers[1]
    before = lin.model.hf(IDS).logits[0, -1, 5]
    register = layer.register_forward_pre_hook if "pre" in point else layer.register_forward_hook
    handle = register(change)
    after = lin.model.hf(IDS).logits[0, -1, 5]
    handle.remove()
    assert found.model == pytest.approx((after - before).item(), abs=1e-12)
    J = lin.jacobian(point, "logits").dense()[5]
    h = lin.value(point)
    expected = -sum(J[i] @ unit * (h[i] @ unit) for i in (1, 4))
    assert found.frozen == pytest.approx(expected.item(), abs=1e-11)


def test_another_prompt_s_values(lin):
    other = linearize(tiny.llama(biases=True), tiny.prompt(6, seed=5), precision="double")
    names = ["L1H2", "L2N3", "attn_out.0", "T1", Direction(torch.ones(24).double(), at="resid_post.0")]
    found = lin.intervene(names, "patch", patch=other, target=5)
    assert all(effect.model and effect.frozen for effect in found.effects)
    for effect in lin.intervene(names, "patch", patch=lin, target=5).effects:
        assert effect.frozen == 0
        assert effect.model == pytest.approx(0, abs=1e-6)  # the norms of Llama round to float32
    every = lin.intervene("mlp_out.2", "patch", patch=other, at=[5], target=Direction(torch.ones(24).double()))
    x = lin.value("resid_mid.2")[5] + other.value("mlp_out.2")[5]
    norm = lin.model.hf.model.norm
    final = norm(lin.value("resid_post.2")[5])
    assert every[0].model == pytest.approx((norm(x) - final).sum().item(), abs=1e-5)


@pytest.mark.parametrize("target", [None, Margin(over="others"), Entropy(), Span(positions=[3, 4, 5])])
def test_targets(lin, target):
    (found,) = lin.intervene("attn_out.1", target=target).effects
    after = edited(lin, partial(without_attention, at=1))
    logits = lin.model.hf(IDS).logits[0]
    if isinstance(target, Entropy):
        expected = [torch.distributions.Categorical(logits=z[-1]).entropy() for z in (after, logits)]
    elif isinstance(target, Span):
        expected = [sum(z[i - 1, IDS[0, i]] for i in (3, 4, 5)) for z in (after, logits)]
    elif target is None:
        expected = [z[-1, logits[-1].argmax()] - z[-1].mean() for z in (after, logits)]
    else:
        best = int(logits[-1].argmax())
        others = lin.value("logits")[-1].index_fill(0, torch.tensor([best]), -torch.inf).softmax(0)
        expected = [z[-1, best] - others @ z[-1] for z in (after, logits)]
    assert found.model == pytest.approx((expected[0] - expected[1]).item(), abs=1e-11)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "bloom", "phi"])
def test_other_families(family):
    """Where nothing nonlinear is behind a component, both say the same: the last MLP, with the norm's scale held."""
    model = families.build(family)
    lin = linearize(model, families.prompt(model), precision="double")
    for name in ("L1H1", "mlp_out.1", "attn_out.0", "T0"):
        effect = lin.intervene(name)[0]
        assert effect.model != 0
        assert effect.frozen != 0


def test_nothing_is_left_behind(lin):
    before = lin.model.hf(IDS).logits
    lin.intervene(["L1H2", "T1", "mlp_out.0"])
    assert torch.equal(lin.model.hf(IDS).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lin.trace.model.hf.modules())


def test_saved_and_loaded(lin, tmp_path):
    found = lin.intervene(["L1H2", "T1"])
    found.save(tmp_path / "a.json")
    assert Interventions.load(tmp_path / "a.json").to_dict() == found.to_dict()
    assert found.table()["component"] == ["L1H2", "T1"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"components": "L9H0"}, OptionError, "the model has layers 0 to 2"),
        ({"components": "L1H4"}, OptionError, "layer 1 has 4 of them, 0 to 3"),
        ({"components": "head 3"}, OptionError, "write L3H5, L3N7, attn_out.3"),
        ({"components": "T9"}, PromptError, "outside the prompt"),
        ({"components": Direction(torch.ones(24), at="final")}, OptionError, "resid_pre.L or resid_post.L"),
        ({"components": Direction(torch.zeros(24), at="resid_pre.0")}, OptionError, "not all of them zero"),
        ({"components": "T1", "how": "patch"}, OptionError, "belong together"),
        ({"components": "T1", "target": [3, 4]}, OptionError, "linearize the whole text"),
        ({"components": "T1", "target": Neuron(1, 0)}, OptionError, "give a target at final or the logits"),
        ({"components": "T1", "at": [77]}, PromptError, "outside the prompt"),
    ],
)
def test_mistakes(lin, options, error, message):
    with pytest.raises(error, match=message):
        lin.intervene(**options)


def test_prompts_of_other_lengths(lin):
    other = linearize(tiny.llama(biases=True), tiny.prompt(5), precision="double")
    with pytest.raises(PromptError, match="6 and 5 tokens"):
        lin.intervene("T1", "patch", patch=other)
