"""An operator does what its definition says, with and without a cache, and refuses what it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import oracle
import tiny
from loclin.errors import LoclinError, OptionError, PromptError, SteeringError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.steering import Operator, activation_addition, merge

BUILDS = {"llama": tiny.llama, "gemma3": tiny.gemma3}
NEW = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def build(request):
    return request.param


@pytest.fixture
def model(build):
    return wrap(build(dtype=torch.float64))


@pytest.fixture
def lin(model):
    return linearize(model, tiny.prompt(5, seed=4), precision="double")


def steer_maps(build, ids, layer, normed=False):
    """J_q [T, d, d] of embed -> resid_post.layer at the last token, by brute force on a model cut off behind it."""
    cut = build(attn="eager")
    cut.model.layers = cut.model.layers[: layer + 1]
    cut.config.num_hidden_layers = layer + 1
    if not normed:
        cut.model.norm = torch.nn.Identity()
    J, _, _ = oracle.jacobian(cut, ids, -1)
    return J.transpose(0, 1)


def author(build, maps, layer, ids, strength, form, at="output"):
    """The steered logits of a whole text, from the definition, position by position; no cache, no hooks of loclin."""
    stock = build()
    x = stock.get_input_embeddings()(ids)[0].detach()

    def change(_module, args, output=None):
        output = args if output is None else output
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        new = hidden.clone()
        for p in range(hidden.shape[1]):
            S = sum(maps[q % len(maps)] @ x[q] for q in range(p + 1))
            h = hidden[0, p]
            if form == "add":
                new[0, p] = h + strength * h.norm() / (2 * S.norm()) * S
            else:
                new[0, p] = strength * h + (1 - strength) * S
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    steered = stock.model.layers[layer]
    steered.register_forward_pre_hook(change) if at == "input" else steered.register_forward_hook(change)
    with torch.no_grad():
        return stock(ids, use_cache=False).logits[0]


@pytest.mark.parametrize(("form", "strength"), [("add", 0.8), ("add", -0.5), ("interpolate", 0.7)])
def test_the_authors_form_step_by_step(build, model, lin, form, strength):
    """h + lambda |h| / (2 |S|) S and equation 16: an independent loop gives the same logits and tokens."""
    layer = 1
    maps = steer_maps(build, lin.input_ids, layer)
    operator = Operator.make(lin, layer)
    ids = tiny.prompt(6, seed=9)
    with operator.apply(model, strength, form), torch.no_grad():
        ours = model.hf(ids).logits[0]
        generated = model.hf.generate(ids, **NEW)
    theirs = author(build, maps, layer, ids, strength, form)
    assert (ours - theirs).norm() <= 1e-11 * theirs.norm()
    told = ids
    for _ in range(NEW["max_new_tokens"]):
        told = torch.cat([told, author(build, maps, layer, told, strength, form)[-1].argmax()[None, None]], dim=1)
    assert torch.equal(generated, told)
    assert (ours - model.hf(ids).logits[0]).norm() > 0.05 * ours.norm()


@pytest.mark.parametrize(("form", "strength"), [("add", 0.8), ("add", -0.5), ("interpolate", 0.7)])
def test_the_published_form_is_a_normed_map_of_a_layers_output_added_at_its_input(build, model, lin, form, strength):
    """The code of the paper's author, step by step: not the map's own end, and not without the final norm."""
    layer, ids = 1, tiny.prompt(6, seed=9)
    operator = Operator.make(lin, layer, at="published")
    assert (operator.target, operator.normed, operator.point) == ("resid_post.1", True, "resid_pre.1")
    maps = steer_maps(build, lin.input_ids, layer, normed=True)
    theirs = author(build, maps, layer, ids, strength, form, at="input")
    with operator.apply(model, strength, form), torch.no_grad():
        ours = model.hf(ids).logits[0]
        generated = model.hf.generate(ids, **NEW)
    assert (ours - theirs).norm() <= 1e-11 * theirs.norm()
    told = ids
    for _ in range(NEW["max_new_tokens"]):
        logits = author(build, maps, layer, told, strength, form, at="input")
        told = torch.cat([told, logits[-1].argmax()[None, None]], dim=1)
    assert torch.equal(generated, told)
    for other in (Operator.make(lin, layer), Operator.make(lin, layer, at="input", normed=True)):
        with other.apply(model, strength, form), torch.no_grad():
            assert (model.hf(ids).logits[0] - theirs).norm() > 1e-3 * theirs.norm()


def test_published_or_not_is_told_merged_and_saved(lin, tmp_path):
    made = {at: Operator.make(lin, 1, at=at, normed=True) for at in ("output", "input", "published")}
    assert [at for at, operator in made.items() if operator.published] == ["published"]
    assert [at for at, operator in made.items() if "added at resid_pre.1" in repr(operator)] == ["published"]
    assert "-> resid_post.1.normed, added at" in repr(made["published"])
    assert merge([made["published"]] * 2).published
    with pytest.raises(SteeringError, match=r"target \('resid_post.1' and 'resid_pre.1'\)"):  # both act at resid_pre.1
        merge([made["published"], made["input"]])
    path = tmp_path / "published.safetensors"
    made["published"].save(path)
    again = Operator.load(path)
    assert again.published
    assert (again.target, again.point) == ("resid_post.1", "resid_pre.1")
    ranked = Operator.make(lin, 1, at="published", rank=2, signs="fixed")
    svd = lin.jacobian(target="resid_post.1", normed=True).svd(2)
    torch.testing.assert_close(ranked.left, svd.U * svd.S.unsqueeze(1), rtol=1e-10, atol=1e-10)
    with pytest.raises((OptionError, TypeError)):
        Operator.make(lin, 1, at="author")


@pytest.mark.parametrize(("form", "strength"), [("add", 0.0), ("interpolate", 1.0)])
def test_unsteered_is_bit_for_bit_the_model(model, lin, form, strength):
    operator, ids = Operator.make(lin, 1), tiny.prompt(6, seed=9)
    before = model.hf(ids).logits
    with operator.apply(model, strength, form):
        assert torch.equal(model.hf(ids).logits, before)


def test_on_its_own_text_it_is_the_hidden_state(model, lin):
    """J x = h: interpolating towards the operator changes nothing at the steering text's last token."""
    operator = Operator.make(lin, 1)
    own = operator.apply_to(lin.embeddings)[-1]
    torch.testing.assert_close(own, activation_addition(lin, "resid_post.1").direction, rtol=1e-11, atol=1e-11)
    seen = {}
    with operator.apply(model, 0.2, "interpolate"):
        handle = model.hf.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.update(h=out))
        model.hf(lin.input_ids)
        handle.remove()
    torch.testing.assert_close(seen["h"][0, -1], own, rtol=1e-5, atol=1e-5)  # the model casts its norms to float32


def test_input_of_a_layer_is_the_output_of_the_one_before(model, lin):
    ids = tiny.prompt(6, seed=9)
    before, after = Operator.make(lin, 1, at="input"), Operator.make(lin, 0)
    assert (before.point, after.point) == ("resid_pre.1", "resid_post.0")
    with before.apply(model, 0.9):
        one = model.hf(ids).logits
    with after.apply(model, 0.9):
        other = model.hf(ids).logits
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_left_padding_and_batches_change_nothing(model, lin):
    """Rows of different lengths give the tokens that they give alone."""
    operator = Operator.make(lin, 1)
    prompts = [tiny.prompt(n, seed=n) for n in (3, 6, 5)]
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor([[p.shape[1]] for p in prompts])).long()
    with operator.apply(model, 0.8):
        alone = [model.hf.generate(p, **NEW)[0, p.shape[1] :] for p in prompts]
        together = model.hf.generate(ids, attention_mask=mask, **NEW)[:, longest:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("form", "neutral"), [("add", 0.0), ("interpolate", 1.0)])
def test_a_batch_may_have_a_strength_for_each_text(model, lin, form, neutral):
    """Each text gives what it gives alone with its strength; beams and samples have their own text's."""
    operator, ids = Operator.make(lin, 1, at="published"), tiny.prompt(6, seed=9)
    strengths = [4.0, neutral, -3.0]
    more = {"num_beams": 2, "num_return_sequences": 2}
    alone = []
    for strength in strengths:
        with operator.apply(model, strength, form):
            alone.append([model.hf.generate(ids, **NEW), model.hf.generate(ids, **NEW, **more)])
    with operator.apply(model, strengths, form):
        together = [model.hf.generate(ids.expand(3, -1), **NEW), model.hf.generate(ids.expand(3, -1), **NEW, **more)]
        with pytest.raises(SteeringError, match="3 strengths for a batch of 4"):
            model.hf(ids.expand(4, -1))
    for found, wanted in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(wanted))
    assert not torch.equal(alone[0][0], alone[1][0])
    for wrong in ([], [0.5, float("inf")]):
        with pytest.raises(OptionError, match="finite"), operator.apply(model, wrong, form):
            pass


def test_beams_and_cut_caches(model, lin):
    """With a cache whose rows are moved or cut, generation gives what it gives without one."""
    operator, ids = Operator.make(lin, 1), tiny.prompt(6, seed=9)
    with operator.apply(model, 0.8):
        beams = [model.hf.generate(ids, use_cache=c, num_beams=4, num_return_sequences=4, **NEW) for c in (True, False)]
        drafted = [model.hf.generate(ids, **NEW), model.hf.generate(ids, prompt_lookup_num_tokens=3, **NEW)]
        samples = []
        for cache in (True, False):
            torch.manual_seed(0)
            options = NEW | {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 3}
            samples.append(model.hf.generate(ids, use_cache=cache, **options))
    assert torch.equal(*beams)
    assert torch.equal(*drafted)
    assert torch.equal(*samples)


def test_streaming(model, lin):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append(None)

    streamer, ids = Streamer(), tiny.prompt(6, seed=9)
    with Operator.make(lin, 1).apply(model, 0.8):
        whole = model.hf.generate(ids, streamer=streamer, **NEW)
    assert streamer.tokens == [*whole[0].tolist(), None]


def test_the_model_is_restored_after_errors(model, lin):
    operator, ids = Operator.make(lin, 1), tiny.prompt(6, seed=9)
    before = model.hf(ids).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
    with pytest.raises(RuntimeError, match="inside"), operator.apply(model, 0.8):
        raise RuntimeError("inside")
    for strength in (1e308, 1e200):
        with pytest.raises(SteeringError, match="smaller"), operator.apply(model, strength):
            model.hf.generate(ids, **NEW)
    assert torch.equal(model.hf(ids).logits, before)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]


def test_caches_from_outside_are_refused(model, lin):
    operator, ids = Operator.make(lin, 1), tiny.prompt(6, seed=9)
    cache = model.hf(ids, use_cache=True).past_key_values
    with pytest.raises(SteeringError, match="empty cache"), operator.apply(model, 0.8):
        model.hf(ids[:, :1], past_key_values=cache)
    with pytest.raises(SteeringError, match="the model itself"), operator.apply(model, 0.8):
        model.hf.model(ids)
    with pytest.raises(SteeringError, match="static cache"), operator.apply(model, 0.8):
        model.hf.generate(ids, cache_implementation="static", **NEW)


def test_a_cache_of_ones_own(model, lin):
    """Feeding a text in pieces is the same as at once; the cache is free of hooks afterwards."""
    operator, ids = Operator.make(lin, 1), tiny.prompt(8, seed=9)
    with operator.apply(model, 0.8), torch.no_grad():
        whole = model.hf(ids).logits
        first = model.hf(ids[:, :3], use_cache=True)
        cache = first.past_key_values
        second = model.hf(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-10, atol=1e-10)
    assert not {"reorder_cache", "batch_repeat_interleave"} & set(vars(cache))


@pytest.mark.parametrize("signs", ["free", "fixed"])
def test_low_rank(lin, signs):
    d = lin.embeddings.shape[1]
    operator, whole = Operator.make(lin, 1, rank=3, signs=signs), Operator.make(lin, 1)
    x = torch.randn(7, d, dtype=torch.float64)
    svd = lin.jacobian(target="resid_post.1").svd(3)
    for q in range(7):
        i = q % 5
        c = svd.Vh[i] @ x[q]
        if signs == "fixed":
            c = c.abs() * torch.sign(svd.Vh[i] @ lin.embeddings[i])
        wanted = svd.U[i] @ (svd.S[i] * c)
        got = operator.push(x[q : q + 1], torch.tensor([q]))[0]
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    full = Operator.make(lin, 1, rank=d)
    torch.testing.assert_close(full.apply_to(x), whole.apply_to(x), rtol=1e-9, atol=1e-9)


def test_alignment_and_tokens(lin):
    x = lin.embeddings
    dense = lin.jacobian(target="resid_post.1").dense().transpose(0, 1)
    nearest = Operator.make(lin, 1, align="nearest")
    order = torch.tensor([3, 0, 4])
    torch.testing.assert_close(
        nearest.push(x[order], torch.arange(3)), torch.einsum("nij,nj->ni", dense[order], x[order])
    )
    one = Operator.make(lin, 1, positions=[-1])
    torch.testing.assert_close(one.push(x, torch.arange(5)), x @ dense[-1].T)
    assert Operator.make(lin, 1, positions=[4, 2, 0]).lengths == [3]


def test_merge_is_the_weighted_sum(model, lin):
    other = linearize(model, tiny.prompt(3, seed=5), precision="double")
    a, b, x = Operator.make(lin, 1), Operator.make(other, 1), torch.randn(8, 24, dtype=torch.float64)
    both = merge([a, b], [2.0, -1.0])
    torch.testing.assert_close(both.apply_to(x), 2 * a.apply_to(x) - b.apply_to(x), rtol=1e-11, atol=1e-11)
    assert [source["weight"] for source in both.sources] == [2.0, -1.0]
    torch.testing.assert_close(merge([a, a]).apply_to(x), a.apply_to(x))
    for wrong in (Operator.make(other, 0), Operator.make(other, 1, normed=True), Operator.make(other, 1, rank=2)):
        with pytest.raises(SteeringError, match="must not differ in"):
            merge([a, wrong])
    up = linearize(model, tiny.prompt(3, seed=5), precision="double", gate="up")
    with pytest.raises(SteeringError, match="gate"):
        merge([a, Operator.make(up, 1)])


def test_save_and_load(lin, tmp_path):
    for n, operator in enumerate([Operator.make(lin, 1), Operator.make(lin, 2, rank=2, signs="fixed", normed=True)]):
        path = tmp_path / f"{n}.safetensors"
        operator.save(path)
        again = Operator.load(path)
        assert torch.equal(again.left, operator.left)
        assert (again.right is None) == (operator.right is None)
        assert again.provenance == operator.provenance
        assert replace(again, left=operator.left, right=None, signs=None, embeddings=operator.embeddings) == replace(
            operator, right=None, signs=None
        )


def test_what_does_not_fit_is_refused(build, model, lin):
    operator = Operator.make(lin, 1)
    for other, why in (
        (wrap(build(seed=3)), "other weights"),
        (wrap(build(dtype=torch.float32)), "dtype 'float64' there, 'float32' here"),
        (wrap(tiny.llama(biases=True)), "another model"),
    ):
        with pytest.raises(SteeringError, match=why), operator.apply(other, 0.5):
            pass
    with pytest.raises(SteeringError, match="gate"), operator.apply(model, 0.5, gate="up"):
        pass
    with operator.apply(model, 0.5, gate="activation"):
        pass
    with pytest.raises(OptionError, match="layers 0 to 2"):
        Operator.make(lin, 3)
    with pytest.raises(OptionError, match="finite"), operator.apply(model, float("nan")):
        pass
    with pytest.raises((OptionError, TypeError)), operator.apply(model, 1.0, "multiply"):
        pass
    with pytest.raises(PromptError):
        Operator.make(lin, 1, positions=[9])
    for options in ({"signs": "fixed"}, {"rank": 99}, {"positions": []}):
        with pytest.raises(LoclinError):
            Operator.make(lin, 1, **options)
