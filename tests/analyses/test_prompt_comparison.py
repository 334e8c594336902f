"""The change of a target between prompts is the sum of what tokens change, by content and by map."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.analyses.attribution.target import LogProb, Margin, Span
from loclin.analyses.prompt_comparison import PromptComparison
from loclin.errors import OptionError
from loclin.linearization import linearize

A, B = torch.tensor([[5, 9, 11, 20, 7]]), torch.tensor([[5, 9, 30, 20, 8, 7]])


@pytest.fixture(scope="module")
def pair():
    model = tiny.llama(biases=True)
    return [linearize(model, ids, precision="double") for ids in (A, B)]


@pytest.mark.parametrize("target", [4, None, (3, 9), Margin(4, "others"), LogProb(4), Span([4, 7])])
def test_changes_sum_to_the_change(pair, target):
    a, b = pair
    found = a.compare_prompts(b, target)
    assert abs(found.residual) < 1e-11
    alone = [one.attribute(target) for one in pair] if target is not None else None
    if alone is not None:
        assert found.target["value"] == pytest.approx(alone[0].value, abs=1e-12)
        assert found.value == pytest.approx(alone[1].value, abs=1e-12)
    for p in found.pairs:
        if p.content is not None:
            assert p.content + p.map == pytest.approx(p.change, abs=1e-13)


def test_content_and_map_are_those_of_the_dense_maps(pair):
    a, b = pair
    found = a.compare_prompts(b, 4)
    assert [(p.at, p.other) for p in found.pairs] == [
        ([0], [0]), ([1], [1]), ([2], [2]), ([3], [3]), ([], [4]), ([4], [5])
    ]  # fmt: skip
    J, K = (one.jacobian(target="logits").dense()[4] for one in pair)
    for p in found.pairs:
        if p.at:
            (i,), (j,) = p.at, p.other
            x, y = a.embeddings[i], b.embeddings[j]
            assert p.content == pytest.approx(((J[i] + K[j]) / 2 @ (y - x)).item(), abs=1e-12)
            assert p.map == pytest.approx(((K[j] - J[i]) @ (x + y) / 2).item(), abs=1e-12)
        else:
            assert p.content is None
            assert p.after == pytest.approx((K[4] @ b.embeddings[4]).item(), abs=1e-12)
    assert found.pairs[0].content == 0  # the same embedding


def test_the_same_prompt_changes_nothing(pair):
    found = pair[0].compare_prompts(pair[0])
    assert found.change == 0
    assert {p.change for p in found.pairs} == {0}


def test_two_models():
    """The same embeddings: all of the change is the map's; other widths are not split."""
    model, other, wide = tiny.llama(biases=True), tiny.llama(biases=True), tiny.gemma3()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    first, second, third = (linearize(one, A, precision="double") for one in (model, other, wide))
    found = first.compare_prompts(second, 4)
    assert abs(found.residual) < 1e-11
    assert all(p.content == 0 for p in found.pairs)
    assert abs(first.compare_prompts(third, 4).residual) < 1e-11


def test_saved_and_loaded(pair, tmp_path):
    found = pair[0].compare_prompts(pair[1], 4)
    found.save(tmp_path / "a.json")
    again = PromptComparison.load(tmp_path / "a.json")
    assert again.to_dict() == found.to_dict()
    assert again.second.token_ids == B[0].tolist()


def test_mistakes(pair):
    a, b = pair
    with pytest.raises(OptionError, match="choose one of token, word"):
        a.compare_prompts(b, 4, align="layer")
    with pytest.raises(OptionError, match="choose special, sink"):
        a.compare_prompts(b, 4, skip="stop words")
    predicted = a.next_token_ids(1)[0][0]
    others = (linearize(a.model, tiny.prompt(5, seed=seed)) for seed in range(20))
    other = next(one for one in others if one.next_token_ids(1)[0][0] != predicted)
    with pytest.raises(OptionError, match="name the token"):
        a.compare_prompts(other, Margin())
