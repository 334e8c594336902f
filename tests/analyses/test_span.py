"""Targets of several tokens, and those that are only tangent to what they are named after: by an oracle of autograd."""

from __future__ import annotations

import pytest
import torch

import shares_oracle
import tiny
from loclin.analyses.attribution.result import KINDS
from loclin.analyses.attribution.target import MEASURES, Entropy, LogProb, Margin, Probability, Span
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families

LEVELS = ("token", "bias", "layer", "head", "neuron", "token×layer", "line")
IDS, ANSWER = tiny.prompt(5), [7, 3, 7]


@pytest.fixture(scope="module")
def lin():
    return linearize(tiny.llama(biases=True), IDS, precision="double")


@pytest.fixture(scope="module")
def network():
    """The same network at the prompt with all but the last token of the answer behind it, by brute force."""
    return shares_oracle.Network(tiny.llama(biases=True, attn="eager"), longer())


def longer():
    return torch.cat([IDS, torch.tensor([ANSWER[:-1]])], dim=1)


def of(found, kind="token"):
    return found.shares[found.kinds == KINDS.index(kind)]


def measured(network, measure: str) -> torch.Tensor:
    """What a span's measure is of the network's logits, with what is frozen at the prompt detached."""
    logits = network.logits[0, 4:7]
    chosen, held = logits[range(3), ANSWER], logits.detach().clone()
    log_p = logits.log_softmax(1)[range(3), ANSWER].sum()
    held[range(3), ANSWER] = -torch.inf
    if measure == "mean":
        chosen = chosen - logits.mean(1)
    elif measure == "runner-up":
        chosen = chosen - logits[range(3), held.argmax(1)]
    elif measure == "others":
        chosen = chosen - (held.softmax(1) * logits).sum(1)
    return {"log-probability": log_p, "probability": log_p.exp()}.get(measure, chosen.sum())


@pytest.mark.parametrize("measure", MEASURES)
def test_a_span_is_what_autograd_says(lin, network, measure):
    target = measured(network, measure)
    found = lin.attribute(Span(ANSWER, of=measure))
    assert found.value == pytest.approx(target.item(), rel=1e-10)
    assert (of(found) - network.by_token(target)).abs().max() < 1e-11
    assert found.target["positions"] == [4, 5, 6]
    assert found.provenance.token_ids == longer()[0].tolist()
    log_p = sum(network.logits[0, 4 + i].log_softmax(0)[token] for i, token in enumerate(ANSWER))
    assert found.target["probability"] == pytest.approx(log_p.exp().item(), rel=1e-9)


@pytest.mark.parametrize("by", LEVELS)
@pytest.mark.parametrize("target", [Span(ANSWER), Span(ANSWER, of="probability"), LogProb(4), Probability(), Entropy()])
def test_every_level_sums_to_it(lin, target, by):
    found = lin.attribute(target, by=by)
    assert found.relative_residual < 1e-12


def test_one_token_is_no_span(lin):
    assert torch.equal(lin.attribute(Span([7])).shares, lin.attribute(7).shares)
    assert lin.attribute([7]).to_dict()["target"] == lin.attribute(7).to_dict()["target"]


def test_spans_in_every_form_are_one(lin):
    expected = lin.attribute(Span(ANSWER)).shares
    for target in (ANSWER, torch.tensor(ANSWER), torch.tensor(ANSWER).numpy()):
        assert torch.equal(lin.attribute(target).shares, expected)
    whole = linearize(tiny.llama(biases=True), torch.cat([longer(), torch.tensor([[7]])], dim=1), precision="double")
    inside = whole.attribute(Span(positions=[5, 6, 7]))
    assert (of(inside)[:7] - of(lin.attribute(ANSWER))).abs().max() < 1e-12
    assert of(inside)[7] == 0  # the last token of the answer predicts nothing of it


def test_what_is_generated(lin):
    ids = IDS.clone()
    for _ in range(3):
        ids = torch.cat([ids, lin.model.hf(ids).logits[:, -1].argmax(1, keepdim=True)], dim=1)
    found = lin.attribute(Span(generated=3))
    assert found.target["ids"] == ids[0, 5:].tolist()
    assert torch.equal(found.shares, lin.attribute(ids[0, 5:].tolist()).shares)


def test_entropy_and_probability(lin):
    logits = lin.value("logits")[-1]
    p = logits.softmax(0)
    assert lin.attribute(Entropy()).value == pytest.approx(-(p * p.log()).sum().item())
    assert lin.attribute(Probability(9)).value == pytest.approx(p[9].item())
    assert lin.attribute(LogProb()).value == pytest.approx(p.max().log().item())


@pytest.mark.parametrize("family", ["gemma2", "t5"])
def test_other_families(family):
    """Soft caps on the logits; a decoder behind an encoder."""
    model = families.build(family, task="seq2seq") if family == "t5" else families.build(family)
    lin = linearize(model, families.prompt(model), precision="double")
    assert lin.attribute([5, 4, 9]).relative_residual < 1e-12
    assert lin.attribute([5, 4, 9], by="bias").relative_residual < 1e-12


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lambda: Span(), OptionError, "by its tokens, by positions"),
        (lambda: Span([3], generated=1), OptionError, "by its tokens, by positions"),
        (lambda: Span([3], of="odds"), OptionError, "choose one of logit"),
        (lambda: Span([]), OptionError, "a span has no tokens"),
        (lambda: [3, 61], OptionError, "the model's tokens are 0 to 60"),
        (lambda: Span(positions=[0, 1]), PromptError, "nothing predicts the first token"),
        (lambda: Span(positions=[2, 2]), OptionError, "each once"),
        (lambda: Span(positions=[9]), PromptError, "outside the prompt"),
        (lambda: Span(generated=0), OptionError, "generated"),
        (lambda: "some words", OptionError, "has no tokenizer"),
        (lambda: Margin(over="log"), OptionError, "choose one of runner-up"),
    ],
)
def test_mistakes(lin, target, error, message):
    with pytest.raises(error, match=message):
        lin.attribute(target())


def test_a_span_has_no_position(lin):
    with pytest.raises(OptionError, match="leave position out"):
        lin.attribute(ANSWER, position=2)


def test_a_span_longer_than_the_context():
    model = tiny.llama()
    model.config.max_position_embeddings = 8
    with pytest.raises(PromptError, match="takes at most 8"):
        linearize(model, IDS).attribute(list(range(3, 12)))
