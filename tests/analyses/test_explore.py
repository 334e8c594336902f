"""An exploration's shares are those of attributions, and of brute force, for every word that it has."""

from __future__ import annotations

import pytest
import torch

import loclin
import shares_oracle
import tiny
from loclin.analyses.exploration import explore as module
from loclin.errors import OptionError, PromptError
from loclin.models import tiny as families

# biases; sliding attention and soft caps; parallel blocks, with a bias of the head and with a scale; whole blocks
EVERY = ("qwen2", "gemma2", "phi", "cohere", "opt")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module", params=EVERY)
def lin(request):
    model = families.build(request.param)
    return loclin.linearize(model, families.prompt(model), precision="double")


@pytest.fixture(scope="module")
def found(lin):
    return lin.explore(count=30)


@pytest.mark.sampled(4)
def test_shares_are_those_of_attributions(lin, found):
    for asked in (found.ids[0], (found.ids[3], found.ids[7]), None):
        shares, goal = found.shares(asked), found.goal(asked)
        by_cell = lin.attribute(asked, by="token×layer", in_words=0)
        assert goal.value == pytest.approx(by_cell.value, rel=1e-12)
        assert abs(found.residual(asked)) < 1e-11 * by_cell.target["size"]
        matrix, names = by_cell.matrix()
        expected, own = dict(zip(names, matrix.T, strict=True)), dict(zip(found.components, shares.T, strict=True))
        behind = own.pop("norm", torch.zeros(len(shares), dtype=torch.float64)).clone()
        behind[-1] += goal.offset
        assert (behind - expected.pop("bias", 0)).abs().max() < 1e-11 * by_cell.target["size"]
        assert own.keys() == expected.keys()
        assert far(torch.stack([own[name] for name in expected]), torch.stack([*expected.values()])) < 1e-11


@pytest.mark.sampled(2)
def test_heads_are_those_of_attributions(lin, found):
    if not found.head_names:
        with pytest.raises(OptionError, match="by='layer'"):
            lin.attribute(by="head")
        return
    by_head = lin.attribute(found.ids[2], by="head", in_words=0)
    expected = {part.name: part.share for part in by_head.parts if part.kind == "head"}
    shares = dict(zip(found.head_names, found.head_shares(found.ids[2]).tolist(), strict=True))
    assert shares == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gemma3])
def test_tokens_are_those_of_brute_force(build):
    ids = tiny.prompt(7)
    found = loclin.linearize(build(), ids, precision="double").explore(position=4)
    network = shares_oracle.Network(build(attn="eager"), ids)
    for word in found.ids[:3]:
        expected = network.by_token(network.logits[0, 4, word])
        assert far(found.shares(word).sum(1)[:-1], expected.to(found.cells)) < 1e-12
        assert found.goal(word).value == pytest.approx(network.logits[0, 4, word].item(), rel=1e-12)
    assert not found.cells[5:7].any()


def test_the_lens_is_that_of_the_model(monkeypatch):
    lin = loclin.linearize(families.build("gemma2"), [3, 4, 5, 6, 7])  # its logits have a soft cap
    found = lin.explore(count=20)
    for position in (2, 4):
        lens = lin.logit_lens(found.ids[5], position=position, k=3)
        column = found.lens_positions.index(position)
        assert found.lens_ranks[:, column, 5].tolist() == [layer.rank for layer in lens]
        words = [[text for text, _ in layer.words] for layer in lens]
        assert [[found.lens_words[str(i)] for i in row[:3]] for row in found.lens_top[:, column].tolist()] == words
    assert found.ranks[:, 5].tolist() == found.lens_ranks[:, found.lens_positions.index(4), 5].tolist()
    monkeypatch.setattr("loclin.analyses.exploration.words.LENS_POSITIONS", 3)
    alone = lin.explore(count=20)
    assert alone.lens_positions == [4]
    assert torch.equal(alone.ranks, found.ranks)
    assert torch.equal(alone.lens_top, found.lens_top[:, -1:])


def test_a_long_prompt_is_summed_up_and_says_so(monkeypatch):
    lin = loclin.linearize(tiny.llama(), tiny.prompt(9), precision="double")
    whole = lin.explore(count=5)
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    found = lin.explore(count=5)
    assert [row.positions for row in found.rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert "9 tokens, which are summed up by group: 3 rows" in found.warnings[-1]
    grouped = torch.stack([*whole.shares()[:-1].unflatten(0, (3, 3)).sum(1), whole.shares()[-1]])
    assert far(found.shares(), grouped) < 1e-12


def test_columns_are_pushed_in_parts_where_memory_is_small(monkeypatch):
    monkeypatch.setattr("loclin.network.prefix._TOGETHER", 2)
    lin = loclin.linearize(tiny.llama(biases=True), tiny.prompt(7), precision="double")
    expected = lin.explore(count=3)
    monkeypatch.setattr("loclin.network.memory.Allowance.spare", 3 * 2 * 7 * 24 * 8)
    assert far(lin.explore(count=3).cells, expected.cells) < 1e-13


def test_float32_is_as_close_as_its_rounding():
    lin = loclin.linearize(tiny.llama(dtype=torch.float32), tiny.prompt(7))
    found = lin.explore()
    assert abs(found.residual()) < tiny.rounding() * lin.attribute().target["size"]


def test_words_that_are_asked_for_come_first():
    lin = loclin.linearize(tiny.llama(), tiny.prompt(4))
    found = lin.explore([7, 50], count=10)
    assert found.ids[:2] == [7, 50]
    assert len(found.ids) == len(set(found.ids)) == 10
    absent = next(i for i in range(tiny.VOCABULARY) if i not in found.ids)
    with pytest.raises(OptionError, match=rf"explore\(words=\[{absent}\]\) adds it"):
        found.goal(absent)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"words": "ab"}, OptionError, "one text where a list is meant"),
        ({"words": [99]}, OptionError, "the model's tokens are 0 to 60"),
        ({"count": 0}, OptionError, "count"),
        ({"position": 9}, PromptError, "outside the prompt"),
    ],
)
def test_mistakes(given, error, why):
    with pytest.raises(error, match=why):
        loclin.linearize(tiny.llama(), tiny.prompt(4)).explore(**given)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked"), ("llama", "classification")])
def test_other_tasks(family, task):
    model = families.build(family, task=task)
    lin = loclin.linearize(model, families.prompt(model), precision="double")
    found = lin.explore(count=9)
    shares = found.shares(found.ids[1]).sum(1)
    tokens, biases = lin.attribute(found.ids[1]).by_token()
    assert shares[:-1].tolist() == pytest.approx(tokens, rel=1e-9, abs=1e-12)
    assert shares[-1].item() + found.goal(found.ids[1]).offset == pytest.approx(biases, rel=1e-9, abs=1e-12)
    assert found.lens_positions == []


def test_a_network_without_layers_is_refused():
    model = families.build("t5", task="seq2seq")
    with pytest.raises(OptionError, match="has no layers to tell apart"):
        loclin.linearize(model, [5, 6, 7]).explore()
