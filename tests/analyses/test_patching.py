"""Activation patching: every change by an oracle of autograd, and what runs say by a run with that activation."""

from __future__ import annotations

import pytest
import torch

import shares_oracle
import tiny
from loclin.analyses.attribution.target import Direction, Margin, Neuron, Span
from loclin.analyses.patching import Patching
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families

IDS, OTHER = tiny.prompt(6), tiny.prompt(6, seed=5)
MODELS = {"llama": lambda **how: tiny.llama(biases=True, **how), "gemma3": tiny.gemma3}


def both(model):
    return [linearize(model, ids, precision="double") for ids in (IDS, OTHER)]


@pytest.fixture(scope="module")
def pair():
    return both(MODELS["llama"]())


def expected(name):
    """The changes of the logit of token 5 at position 4, by each kind of points, and by each layer's heads."""
    model = MODELS[name](attn="eager")
    one, two = (shares_oracle.Network(model, ids) for ids in (IDS, OTHER))
    target = one.logits[0, 4, 5]

    def change(kind):
        rows = zip(getattr(one, kind), getattr(two, kind), strict=True)
        return [(one.vjp(target, a) * (b - a))[0].detach() for a, b in rows]

    found = {"resid_pre": "pre", "attn_out": "attn", "mlp_out": "mlp", "resid_post": "stream"}
    heads = [row.unflatten(-1, (4, -1)).sum(-1).T for row in change("z")]
    return {kind: torch.stack([row.sum(-1) for row in change(at)]) for kind, at in found.items()}, torch.cat(heads)


@pytest.mark.parametrize("name", MODELS)
def test_changes_are_what_autograd_says(name):
    lin, other = both(MODELS[name]())
    wanted, heads = expected(name)
    found = lin.patch(other, 5, position=4)
    assert found.kinds == ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    for kind, rows in wanted.items():
        matrix, names = found.matrix(kind)
        assert names == [f"{kind}.{i}" for i in (range(3) if kind != "resid_post" else [2])]
        assert (matrix - rows).abs().max() < 1e-11
    assert found.points[:4] == ["resid_pre.0", "attn_out.0", "mlp_out.0", "resid_pre.1"]
    by_head = lin.patch(other, 5, position=4, by="head")
    assert by_head.points == [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    assert (by_head.changes - heads).abs().max() < 1e-11
    logits = [one.trace.logits(4)[5].item() for one in (lin, other)]
    assert found.change == pytest.approx(logits[1] - logits[0], abs=1e-12)


@pytest.mark.parametrize("by", ["layer", "head"])
def test_the_largest_are_checked_by_interventions(pair, by):
    lin, other = pair
    found = lin.patch(other, (5, 9), by=by, verify=3)
    assert len(found.checked) == sum(min(3, found.matrix(kind)[0].numel()) for kind in found.kinds)
    for effect in found.checked:
        point, _, token = effect.name.partition("@")
        row = found.changes[found.points.index(point)]
        assert effect.frozen == pytest.approx(row[int(token)].item(), abs=1e-11)
        alone = lin.intervene(point, "patch", patch=other, target=(5, 9), at=[int(token)])
        assert effect.model == pytest.approx(alone[0].model, abs=1e-12)
        assert alone.predicted == found.predicted
    for kind in found.kinds:
        sizes = found.matrix(kind)[0].abs().flatten().sort(descending=True).values
        assert [abs(change) for *_, change in found.top(3, kind)] == pytest.approx(sizes[:3].tolist())


@pytest.mark.parametrize("point", ["resid_pre.1", "resid_post.0"])
def test_a_run_with_the_residual_stream_of_another_prompt(pair, point):
    """All of it at once makes the other prompt's prediction; at one token, that of a model run with a hook."""
    lin, other = pair
    model = lin.model.hf
    (whole,) = lin.intervene(point, "patch", patch=other, target=5).effects
    logits = [model(ids).logits[0, -1, 5].item() for ids in (IDS, OTHER)]
    assert whole.model == pytest.approx(logits[1] - logits[0], abs=1e-6)  # the norms of Llama round to float32

    def change(_module, args):
        hidden = args[0].clone()
        hidden[0, 2] = other.value("resid_pre.1")[2]
        return (hidden, *args[1:])

    handle = model.model.layers[1].register_forward_pre_hook(change)
    after = model(IDS).logits[0, -1, 5].item()
    handle.remove()
    (one,) = lin.intervene(point, "patch", patch=other, target=5, at=[2]).effects
    assert one.model == pytest.approx(after - logits[0], abs=1e-12)


@pytest.mark.parametrize("family", ["phi", "gpt2", "mixtral"])
def test_other_families(family):
    """Parallel attention and MLP; biases; experts: each agrees with a single intervention."""
    model = families.build(family)
    ids = families.prompt(model)
    lin, other = (linearize(model, one, precision="double") for one in (ids, ids.flip(1)))
    found = lin.patch(other, 5, verify=1)
    for effect in found.checked:
        point, _, token = effect.name.partition("@")
        row = found.changes[found.points.index(point)]
        assert effect.frozen == pytest.approx(row[int(token)].item(), abs=1e-10)
        assert effect.frozen != 0


@pytest.mark.parametrize("target", [None, Margin(over="others"), Span(positions=[3, 4, 5]), "final"])
def test_targets(pair, target):
    lin, other = pair
    chosen = Direction(torch.ones(24).double()) if target == "final" else target
    found = lin.patch(other, chosen)
    last = found.matrix("resid_post")[0].sum().item()
    J = lin.jacobian("resid_post.2", "final")
    if target == "final":  # through the frozen norm alone
        assert last == pytest.approx((J.matvec(other.value("resid_post.2") - J.input)).sum().item(), abs=1e-11)
        assert found.value == pytest.approx(other.value("final")[-1].sum().item(), abs=1e-11)
    assert lin.patch(lin, chosen or 5).changes.abs().max() == 0
    assert found.change != 0


def test_saved_and_loaded(pair, tmp_path):
    found = pair[0].patch(pair[1], 5, verify=1)
    found.save(tmp_path / "a.safetensors")
    assert Patching.load(tmp_path / "a.safetensors").to_dict() == found.to_dict()
    table = found.table()
    assert len(table["point"]) == 10 * 6
    assert sum(value is not None for value in table["model"]) == 4


def test_nothing_is_left_behind(pair):
    lin, other = pair
    before = lin.model.hf(IDS).logits
    lin.patch(other, verify=2)
    assert torch.equal(lin.model.hf(IDS).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lin.trace.model.hf.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "neuron"}, "choose layer or head"),
        ({"target": [3, 4]}, "linearize the whole text"),
        ({"target": Neuron(1, 0)}, "give a target at final or the logits"),
        ({"verify": -1}, "verify"),
    ],
)
def test_mistakes(pair, options, message):
    with pytest.raises(OptionError, match=message):
        pair[0].patch(pair[1], **options)


def test_prompts_that_do_not_fit(pair):
    with pytest.raises(PromptError, match="6 and 5 tokens"):
        pair[0].patch(linearize(pair[0].model, tiny.prompt(5)))
    with pytest.raises(OptionError, match="3 layers of width 24, .* 2 of 24"):
        pair[0].patch(linearize(tiny.llama(layers=2), OTHER))
    gpt = families.build("mamba")
    lin = linearize(gpt, families.prompt(gpt))
    with pytest.raises(OptionError, match="No heads"):
        lin.patch(lin, 5, by="head")
