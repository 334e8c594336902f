"""Shares, single effects, curves and projections against toys, brute force and SciPy; a study that goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from loclin.analyses.faithfulness import methods, planes, summary
from loclin.analyses.faithfulness import study as study_module
from loclin.analyses.faithfulness.deletion import Removal, rank_positions, replace_each
from loclin.analyses.faithfulness.prompts import HALVES, StudyPrompt, load_prompts
from loclin.analyses.faithfulness.study import Faithfulness, PromptResult, faithfulness
from loclin.analyses.faithfulness.summary import interval, rank_correlations
from loclin.analyses.nearby import Nearby
from loclin.errors import ModelError, OptionError, OutputError
from loclin.linearization import linearize
from loclin.models import wrap
from loclin.report.faithfulness import faithfulness_markdown

WORTH = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0])


class _Additive(Nearby):
    """A toy model: the target's log-probability is minus 40, plus what each token is worth."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def tokens(self, ids):
        self.calls.append(tuple(ids.shape))
        return SimpleNamespace(log_probabilities=(WORTH[ids].sum(1) - 40)[:, None])


@pytest.fixture(scope="module")
def model():
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    return wrap(tiny.llama(), named)


def _prompts(count: int) -> list[StudyPrompt]:
    halves = ("development", "held-out")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.permutation(12)[: 5 + number % 3]) for number in range(count)]
    return [StudyPrompt("words", text, halves[number % 2]) for number, text in enumerate(texts)]


def test_the_packaged_prompts():
    prompts = load_prompts()
    assert len(prompts) >= 200
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(prompt.text == prompt.text.strip() for prompt in prompts)
    held_out = [prompt for prompt in prompts if prompt.half == "held-out"]
    assert len(held_out) == len(prompts) - len(held_out)
    few = load_prompts(32)
    assert few == prompts[:32]
    assert len({(prompt.kind, prompt.half) for prompt in few[:16]}) == 16
    assert load_prompts(seed=1) != prompts
    assert set(load_prompts(seed=1)) == set(prompts)
    with pytest.raises(OptionError, match="from 1 to"):
        load_prompts(len(prompts) + 1)


def test_rank_correlations_are_spearmans():
    random = np.random.default_rng(0)
    scores, effects = random.normal(size=(6, 9)), random.integers(0, 4, 9)
    scores[1] = scores[1].round()
    scores[2] = 3
    found = rank_correlations(scores, effects)
    for row, value in zip(scores[[0, 1, 3, 4, 5]], np.delete(found, 2), strict=True):
        assert value == pytest.approx(scipy.stats.spearmanr(row, effects).statistic, abs=1e-12)
    assert math.isnan(found[2])


def test_intervals_hold_the_mean_as_often_as_they_say():
    random = np.random.default_rng(0)
    found = [interval(random.exponential(size=60).tolist()) for _ in range(60)]
    assert 50 <= sum(one.low <= 1 <= one.high for one in found) <= 60
    assert interval([1.0, math.nan, 3.0]).mean == 2
    assert interval([1.0, math.nan, 3.0]).n == 2
    assert interval([2.0]) == interval([2.0, math.nan])


def test_curves_of_a_model_that_adds_up():
    toy = _Additive()
    removal = Removal(toy, torch.tensor([[1, 5, 2, 4]]), 0)
    assert removal.single().tolist() == [1, 16, 2, 8]
    assert removal.curve([1, 3, 2]) == [16, 24, 26]
    assert removal.curve([0, 2, 3, 1]) == [1, 3, 11]  # one is left
    before = len(toy.calls)
    removal.prepare([[1, 3, 2], [0, 2, 3, 1]])
    assert len(toy.calls) == before
    removal.prepare([[3, 0], [2, 1], [2, 3]])
    assert [shape[1] for shape in toy.calls[before:]] == [2]  # those of one length together, single ones known
    assert Removal(toy, torch.tensor([[3]]), 0).single().tolist() == [0]


def test_ranking():
    assert rank_positions([3.0, 1.0, 2.0, 5.0], [0, 1, 2]) == [0, 2, 1]


def test_single_effects_are_the_models_own(model):
    lin = linearize(model, "w3 w4 w5 w6 w7")
    target = 9
    whole = torch.log_softmax(model.hf(lin.input_ids).logits[0, -1].double(), -1)[target]
    removed = Removal(Nearby(lin), lin.input_ids, target).single()
    gone = replace_each(Nearby(lin), lin.embeddings, target, study_module.mean_embedding(model).to(lin.embeddings))
    for i in range(5):
        ids = torch.cat([lin.input_ids[:, :i], lin.input_ids[:, i + 1 :]], dim=1)
        without = torch.log_softmax(model.hf(ids).logits[0, -1].double(), -1)[target]
        assert removed[i].item() == pytest.approx((whole - without).item(), abs=1e-4)
        embeddings = model.hf.get_input_embeddings()(lin.input_ids).clone()
        embeddings[0, i] = model.hf.get_input_embeddings().weight.mean(0)
        other = torch.log_softmax(model.hf(inputs_embeds=embeddings).logits[0, -1].double(), -1)[target]
        assert gone[i].item() == pytest.approx((whole - other).item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny.llama, tiny.gemma3], ids=["llama", "gemma3"])
def test_shares_sum_to_what_they_share_out(build):
    lin = linearize(build(), tiny.prompt(6), precision="double")
    found = methods.frozen(lin, lin.embeddings.mean(0))
    logits = lin.trace.stock_logits.double()
    first, second = logits.topk(2).indices
    wanted = {
        "logit": logits[first],
        "margin": logits[first] - logits[second],
        "centred": logits[first] - logits.mean(),
    }
    for name, expected in wanted.items():
        for gate in methods.GATES:
            assert found[f"frozen/{gate}/{name}/zero"].sum().item() == pytest.approx(expected.item(), rel=1e-4)
    p = logits.softmax(-1)
    linear = logits[first] - p @ logits
    assert found["frozen/up/log-probability/zero"].sum().item() == pytest.approx(linear.item(), rel=1e-4)
    for gate in methods.GATES:
        J = linearize(lin.model, lin.input_ids, gate=gate, precision="double").jacobian(target="logits")
        shares = (J.rmatvec(torch.nn.functional.one_hot(first, len(logits)).double()) * J.input).sum(-1)
        assert torch.allclose(found[f"frozen/{gate}/logit/zero"], shares, atol=1e-10)


def test_gradients_are_those_of_the_ordinary_jacobian():
    lin = linearize(tiny.llama(), tiny.prompt(6), precision="double")
    found = methods.gradient(lin, Nearby(lin), torch.zeros_like(lin.embeddings[0]))
    target = lin.trace.stock_logits.argmax()
    slope = lin.ordinary_jacobian().rmatvec(lin.model.hf.lm_head.weight[target].detach().double())
    assert torch.allclose(found["gradient/logit/zero"], (slope * lin.embeddings).sum(-1), atol=1e-5)
    assert torch.equal(found["gradient/logit/zero"], found["gradient/logit/mean"])


def test_integrated_gradients_add_up(monkeypatch):
    pytest.importorskip("captum")
    monkeypatch.setattr(methods, "STEPS", 400)
    lin = linearize(tiny.llama(), tiny.prompt(6))
    nearby, mean = Nearby(lin), lin.embeddings.mean(0)
    found = methods.integrated_gradients(lin, nearby, mean, [2])["integrated/log-probability/mean"]
    assert found[2].item() == 0
    target = lin.trace.stock_logits.argmax()
    ends = torch.stack([lin.embeddings, mean.expand(6, -1)])
    ends[1, 2] = lin.embeddings[2]
    there, start = nearby.embeddings(ends).log_probabilities[:, target].tolist()
    assert found.sum().item() == pytest.approx(there - start, rel=0.002)


def test_projections_against_dense_singular_vectors():
    lin = linearize(tiny.llama(), tiny.prompt(5), precision="double")
    target = int(lin.trace.stock_logits.argmax())
    found = {(one.plane, one.k): one for one in planes.project(lin, Nearby(lin), target)}
    x, dense = lin.embeddings, lin.jacobian().dense()
    for k in planes.RANKS:
        each = torch.stack([torch.linalg.svd(dense[:, i]).Vh[:k] for i in range(5)])
        off = torch.einsum("tkd,tke,te->td", each, each, x)
        Vh = torch.linalg.svd(dense.flatten(1), full_matrices=False).Vh[:k]
        together = (Vh.T @ Vh @ x.flatten()).reshape(x.shape)
        words = torch.tensor([float(i not in lin.sinks) for i in range(5)])[:, None]
        for plane, part in (("each", off), ("joint", together), ("each word", off * words)):
            ids_free = lin.model.hf(inputs_embeds=(x - part)[None]).logits[0, -1].double().log_softmax(-1)
            stock = lin.trace.stock_logits.double().log_softmax(-1)
            assert found[plane, k].moved == pytest.approx((part.norm() / x.norm()).item(), rel=1e-6)
            assert found[plane, k].drop == pytest.approx((stock - ids_free)[target].item(), abs=1e-4)
            assert found[f"{plane} moved", k].moved == pytest.approx(found[plane, k].moved, rel=1e-9)
            assert found[f"{plane} random", k].moved > 0


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    prompts, path = _prompts(7), tmp_path / "study.json"
    whole = faithfulness(model, prompts, planes=1)
    in_order = [prompt.text for half in HALVES for prompt in prompts if prompt.half == half]
    measure, calls = study_module.measure, []

    def interrupted(*args, **kwargs):
        calls.append(args[1].text)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(study_module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        faithfulness(model, prompts, planes=1, path=path)
    assert [prompt.text for prompt in Faithfulness.load(path).prompts] == in_order[:4]
    said: list[str] = []
    found = faithfulness(model, prompts, planes=1, path=path, progress=said.append)
    assert calls[6:] == in_order[4:]
    assert said[-1] == f"{path} has 4 prompts: resuming"
    assert [asdict(one) for one in found.prompts] == [asdict(one) for one in whole.prompts]
    assert Faithfulness.load(path) == found
    faithfulness(model, prompts, planes=1, path=path, seed=1, progress=said.append)
    assert "starting over" in said[-1]


def test_what_is_no_study_is_left_alone(model, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(OutputError, match="Faithfulness"):
        faithfulness(model, _prompts(1), path=path)
    assert "something else" in path.read_text()


@pytest.mark.slow
def test_curves_are_of_the_held_out_half(model):
    found = faithfulness(model, _prompts(4), bos=True, planes=1)
    for prompt in found.prompts:
        assert 0 in prompt.sinks
        assert bool(prompt.curves) == (prompt.half == "held-out")
        for test, curves in prompt.curves.items():
            free = len(prompt.tokens) - len(prompt.sinks) - (test != "first, all")
            assert {len(curve) for curve in curves.values()} == {free}
            ends = {round(curve[-1], 9) for curve in curves.values()}
            assert len(ends) == 1  # all orders end with the same tokens gone
    assert [bool(prompt.planes) for prompt in found.prompts] == [False, False, True, False]


def test_positions_added_to_embeddings_are_refused(model):
    handle = model.hf.get_decoder().layers[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))
    try:
        with pytest.raises(ModelError, match="embeddings alone"):
            faithfulness(model, _prompts(1))
    finally:
        handle.remove()


def _result(half: str, number: int, sinks: list[int]) -> PromptResult:
    random = np.random.default_rng(number)
    effects = random.normal(size=6)
    shares = {
        "frozen/activation/logit/zero": effects.tolist(),
        "frozen/half/centred/zero": (effects**3).tolist(),
        "backwards": (-effects).tolist(),
        "by size": (-np.abs(effects)).tolist(),
        "even": [1.0] * 6,
    }
    curves = {"first": {"backwards": [1.0, 3.0], "random 1": [2.0, 2.0], "random 2": [4.0, 4.0]}}
    return PromptResult(
        "toy", f"p{number}", half, ["a"] * 6, sinks, "t", 0.5, shares,
        {"removed": effects.tolist(), "replaced": (effects**2).tolist()}, curves if half == "held-out" else {},
    )  # fmt: skip


def test_what_the_numbers_say():
    halves = ("development", "held-out")
    found = Faithfulness({}, {}, [_result(halves[i % 2], i, [0] if i % 3 else [0, 1, 2]) for i in range(24)])
    best = summary.correlations(found, "development", "removed", last=False)
    assert list(best)[:2] == ["frozen/activation/logit/zero", "frozen/half/centred/zero"]
    assert best["frozen/activation/logit/zero"].mean == pytest.approx(1)
    assert best["frozen/activation/logit/zero"].n == 8  # the others have two tokens to rank
    assert best["backwards"].mean == pytest.approx(-1)
    assert best["even"].n == 0
    assert summary.correlations(found, "development", "removed", last=True)["backwards"].n == 12
    sized = summary.correlations(found, "held-out", "replaced", last=False, sizes=True)
    assert sized["by size"].mean == pytest.approx(1)
    hits = summary.hits(found, "held-out", "removed", last=False)
    assert (hits["frozen/activation/logit/zero"].mean, hits["backwards"].mean) == (1, 0)
    assert hits["random"].mean == pytest.approx(1 / 4)
    ahead = summary.advantage(found, "held-out", "removed", False, "frozen/activation/logit/zero", "backwards")
    assert ahead.mean == pytest.approx(2)
    areas = summary.deletion(found, "first")
    assert areas["backwards"].mean == 2
    assert areas["random"].mean == 3
    parts = summary.apart(found, "even")
    assert parts["attention sink"]["share"].mean == pytest.approx(1 / 6)
    assert summary.kinds(found, "held-out", "removed", False, "backwards")["toy"].mean == pytest.approx(-1)
    text = faithfulness_markdown(found)
    assert "| frozen map, activation, logit | 1.00 (1.00 to 1.00) |" in text
    assert "| backwards | 2.00 (2.00 to 2.00) | " in text  # ahead of it by so much
    assert "| random | 3.00 (3.00 to 3.00) | – | – |" in text
