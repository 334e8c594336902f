"""A replay gives what a steered model gives, a sweep chooses within its limit, and texts are measured as defined."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.steering import Operator, random_direction
from loclin.steering.replay import Replay
from loclin.steering.search import depths, score, sweep
from loclin.steering.writing import frequency, repetition, write

BUILDS = {"llama": tiny.llama, "gemma3": tiny.gemma3}
PROMPTS = [tiny.prompt(n, seed=n) for n in (3, 6, 5)]
IDS = [5, 17]


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def model(request):
    return wrap(request.param(dtype=torch.float64))


@pytest.fixture
def replay(model):
    return Replay(model, PROMPTS)


def last(model, ids):
    return model.hf(ids, use_cache=False).logits[0, -1].float().log_softmax(-1).detach()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("layer", "at"), [(0, "input"), (0, "output"), (0, "published"), (1, "output"), (2, "published"), (2, "output")]
)
@pytest.mark.parametrize(("form", "strength"), [("add", 0.8), ("interpolate", 0.6)])
def test_a_replay_is_the_steered_model(model, replay, layer, at, form, strength):
    lin = linearize(model, tiny.prompt(5, seed=4), precision="double")
    forwards = [layer.forward for layer in model.hf.model.layers]
    for steering in (Operator.make(lin, layer, at=at), random_direction(model, f"resid_post.{layer}")):
        found = replay.log_probs(steering, strength, form)
        with steering.apply(model, strength, form):
            wanted = torch.stack([last(model, ids) for ids in PROMPTS])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert [layer.forward for layer in model.hf.model.layers] == forwards
    assert all("forward" not in vars(layer) for layer in model.hf.model.layers)


def test_scores(model, replay):
    steering = random_direction(model, "resid_post.1")
    p, q = replay.log_probs(steering, 1.0).double(), replay.unsteered.double()
    found = score(replay.unsteered, IDS, p.float())
    gain = (p.exp()[:, IDS].sum(1) / q.exp()[:, IDS].sum(1)).log()
    torch.testing.assert_close(found.gain.double(), gain, rtol=1e-4, atol=1e-4)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-4)


def test_a_sweep_takes_the_largest_gain_within_the_limit(model, replay):
    made = {layer: random_direction(model, f"resid_post.{layer}", seed=layer) for layer in range(3)}
    found = sweep(replay, IDS, made.__getitem__, range(3), strengths=(0.2, 0.5, 1.0, 3.0), max_kl=0.3)
    assert len(found.trials) == 12
    allowed = [trial for trial in found.trials if trial.kl <= 0.3]
    assert 0 < len(allowed) < 12
    assert found.best.gain == max(trial.gain for trial in allowed)
    least = sweep(replay, IDS, made.__getitem__, [1], strengths=(3.0, 5.0), max_kl=1e-9)
    assert least.best.kl == min(trial.kl for trial in least.trials)
    with pytest.raises(OptionError, match="at least one"):
        sweep(replay, IDS, made.__getitem__, [], strengths=(1.0,))


def test_what_is_written_is_measured(model):
    """Greedy, the loss is that of the text's own tokens, one by one; a text ends where the model ends it."""
    plain = write(model, PROMPTS, [], max_new_tokens=6, eos_token_id=None)
    for ids, found in zip(PROMPTS, plain, strict=True):
        told, losses = ids, []
        for token in found.ids:
            log_p = last(model, told)
            assert token == log_p.argmax().item()
            losses.append(-log_p[token].item())
            told = torch.cat([told, torch.tensor([[token]])], 1)
        assert found.loss == pytest.approx(sum(losses) / 6, rel=1e-4)
    end = plain[0].ids[2]
    model.hf.generation_config.eos_token_id = end
    short = write(model, PROMPTS[:1], [], max_new_tokens=6)[0]
    assert short.ended
    assert short.ids == plain[0].ids[: plain[0].ids.index(end)]
    steering = random_direction(model, "resid_post.1")
    same = write(model, PROMPTS, [], steering=steering, strength=0.0, max_new_tokens=6, eos_token_id=None)
    assert same == plain


def test_sampling_is_repeatable_and_leaves_the_generator_alone(model):
    before = torch.get_rng_state()
    first, again, other = (write(model, PROMPTS, [], seed=s, max_new_tokens=8, temperature=2.0) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other


def test_counting():
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([1, 2]) == 0
    assert frequency("The Bridge, a bridge. Bridges!", ["bridge"]) == pytest.approx(40)
    assert frequency("", ["x"]) == 0
    assert depths(18) == [5, 8, 11, 14]
    assert depths(1) == [0]
