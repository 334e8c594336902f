"""The difference of two answers of several tokens: by an oracle of autograd for each, and summed at every level."""

from __future__ import annotations

import math

import pytest
import torch

import shares_oracle
import tiny
from loclin.analyses.attribution.result import Attribution
from loclin.analyses.attribution.target import LogProb, Margin, Span
from loclin.errors import OptionError
from loclin.freeze import SharedAttention
from loclin.linearization import linearize

IDS, FIRST, SECOND = tiny.prompt(5), [7, 3, 8], [7, 12, 3, 9]
LEVELS = ("token", "bias", "layer", "head", "neuron", "token×layer", "line")


@pytest.fixture(scope="module")
def lin():
    return linearize(tiny.llama(biases=True), IDS, precision="double")


def network(answer):
    """The network at the prompt with all but the last token of an answer behind it, and the answer's logits."""
    found = shares_oracle.Network(
        tiny.llama(biases=True, attn="eager"), torch.cat([IDS, torch.tensor([answer[:-1]])], dim=1)
    )
    return found, found.logits[0, 4:][range(len(answer)), answer].sum()


@pytest.fixture(scope="module")
def both():
    return network(FIRST), network(SECOND)


def named(found):
    return {(part.name, part.token): part.share for part in found.parts}


def test_shares_are_what_autograd_says(lin, both):
    found = lin.attribute((FIRST, SECOND))
    (one, first), (two, second) = both
    a, b = one.by_token(first), two.by_token(second)
    expected = torch.cat([a[:5] - b[:5], a[5:], -b[5:]])
    shares, biases = found.by_token()
    assert (torch.tensor(shares, dtype=torch.float64) - expected).abs().max() < 1e-11
    assert found.value == pytest.approx((first - second).item(), abs=1e-11)
    assert biases == pytest.approx((first - second - expected.sum()).item(), abs=1e-11)
    assert found.texts == [str(token) for token in [*IDS[0].tolist(), *FIRST[:-1], *SECOND[:-1]]]
    assert [found.side(i) for i in (4, 5, 6, 7, 9)] == [None, "first", "first", "second", "second"]
    assert found.table()["side"][:11] == [None] * 5 + ["first"] * 2 + ["second"] * 3 + [None]
    against = found.target["against"]
    assert against["positions"] == [4, 7, 8, 9]
    assert against["ids"] == SECOND
    assert found.value + against["value"] == pytest.approx(first.item(), abs=1e-11)


def test_heads_and_neurons_are_what_autograd_says(lin, both):
    heads = named(lin.attribute((FIRST, SECOND), by="head"))
    neurons = named(lin.attribute((FIRST, SECOND), by="neuron", in_words=0))
    for layer in range(3):
        sums = []
        for net, target in both:
            direct = net.vjp(target, net.stream[0])
            sums.append([net.by_head((direct * net.attn[layer]).sum(), layer), net.by_neuron(
                (direct * net.mlp[layer]).sum(), layer
            )])  # fmt: skip
        for i, share in enumerate(sums[0][0] - sums[1][0]):
            assert heads[f"L{layer}H{i}", None] == pytest.approx(share.item(), abs=1e-11)
        for i, share in enumerate(sums[0][1] - sums[1][1]):
            assert neurons[f"L{layer}N{i}", None] == pytest.approx(share.item(), abs=1e-11)


@pytest.mark.parametrize(
    ("pair", "levels"),
    [
        ((FIRST, SECOND), LEVELS),
        ((4, SECOND), ("layer",)),
        ((Span(FIRST, of="log-probability"), Span(SECOND, of="log-probability")), ("bias",)),
        ((LogProb(4), LogProb(9)), ("token",)),
        ((Span(positions=[3, 4]), Span([5, 9])), ("head",)),
    ],
)
def test_every_level_sums_to_it(lin, pair, levels):
    each = [lin.attribute(Span([one]) if isinstance(one, int) else one) for one in pair]
    for by in levels:
        found = lin.attribute(pair, by=by, in_words=2)
        assert found.relative_residual < 1e-12
        assert found.value == pytest.approx(each[0].value - each[1].value, abs=1e-11)
    assert Attribution.from_json(found.to_json()).to_dict() == found.to_dict()


def test_one_kind_of_share_is_one_share(lin):
    """What is the same in both prompts is subtracted, whatever order each sweep finds it in."""
    whole = lin.attribute((FIRST, SECOND), by="bias")
    each = [lin.attribute(one, by="bias") for one in (FIRST, SECOND)]
    a, b = (named(one) for one in each)
    assert a.keys() | b.keys() == named(whole).keys()
    for key, share in named(whole).items():
        assert share == pytest.approx(a.get(key, 0.0) - b.get(key, 0.0), abs=1e-12)
    assert lin.attribute((FIRST, FIRST), by="head", in_words=0).shares.abs().max() == 0


def test_two_single_tokens_are_as_before(lin):
    spans = lin.attribute((Span([5]), Span([9])), by="head")
    tokens = lin.attribute((5, 9), by="head")
    assert tokens.target["kind"] == "logit difference"
    assert (spans.shares - tokens.shares).abs().max() < 1e-12
    for i in tokens.ranking(5, "head"):
        assert spans[i].writes == [(text, pytest.approx(score)) for text, score in tokens[i].writes]
    read = [[sum(one.attends[str(i)]) for i in tokens.ranking(5, "head")] for one in (spans, tokens)]
    assert read[0] == pytest.approx(read[1], abs=1e-11)


def test_what_heads_read_is_a_part_of_their_share():
    model = tiny.llama()
    found = linearize(model, IDS, precision="double").attribute((FIRST, SECOND), by="head")
    for part in found.top(12, "head"):
        if part.layer == 0:  # without biases in front of it, all of it is read at tokens
            assert sum(part.attends) == pytest.approx(part.share, abs=1e-11)
    assert any(part.layer == 0 for part in found.top(12, "head"))


def test_groups(lin):
    found = lin.attribute((FIRST, SECOND), by={"a": [0, 3]}, skip=[1])
    assert [(group.name, group.positions) for group in found.groups] == [
        ("a", [0, 3]), (str(IDS[0, 1].item()), [1]), ("other tokens", [2, 4]), ("7 3", [5, 6]), ("7 12 3", [7, 8, 9]),
    ]  # fmt: skip
    shares, _ = lin.attribute((FIRST, SECOND)).by_token()
    for part in found.parts:
        if part.kind == "group":
            expected = math.fsum(shares[i] for i in found.groups[part.index].positions)
            assert part.share == pytest.approx(expected, abs=1e-12)


def test_shared_attention_says_how_far_it_misses(lin):
    found = lin.attribute((FIRST, SECOND), attention=SharedAttention(0.1, 0.1, 0.8))
    each = [lin.attribute(one, attention=SharedAttention(0.1, 0.1, 0.8)).residual for one in (FIRST, SECOND)]
    assert found.residual == pytest.approx(each[0] - each[1], abs=1e-11)
    (note,) = [text for text in found.warnings if "not exact" in text]
    assert f"{found.residual:+.4g}" in note


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((FIRST, Span(SECOND, of="mean")), "a difference of logit and mean"),
        ((FIRST, Margin()), "is none: give texts, ids"),
        ((FIRST, torch.ones(3)), "is none: give texts, ids"),
        ((FIRST, [61, 3]), "the model's tokens are 0 to 60"),
        (([], SECOND), "a span has no tokens"),
    ],
)
def test_mistakes(lin, pair, message):
    with pytest.raises(OptionError, match=message):
        lin.attribute(pair)


def test_other_questions_are_about_two_tokens(lin):
    for ask in (lin.intervene, lin.compare_prompts):
        with pytest.raises(OptionError, match="attribute alone"):
            ask("T1" if ask == lin.intervene else lin, target=(FIRST, SECOND))
