"""The cosines of the tokens' maps are those of a loop over the oracle's maps, and no factor of the map changes them."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loclin
import oracle
import tiny
from least import within
from loclin.errors import PromptError
from loclin.network.chain import Chain

BUILDS = {"llama": tiny.llama, "gemma3": tiny.gemma3}


def slow_cosines(J):
    """One pair and one number after the other."""
    maps = [J[:, i].flatten().tolist() for i in range(J.shape[1])]
    found = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            size = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
            found[i, j] = math.fsum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0
    return found


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("name", BUILDS)
def test_cosines_are_those_of_the_oracle(name, position):
    model, ids = BUILDS[name](attn="eager"), tiny.prompt(5)
    found = loclin.linearize(model, ids, precision="double").similarity(position=position)
    expected = slow_cosines(oracle.jacobian(model, ids, position)[0])
    assert found.cosines.dtype == torch.float64
    assert torch.allclose(found.cosines, expected, rtol=0, atol=tiny.rounding())
    assert torch.equal(found.cosines, found.cosines.T)
    assert found.provenance.position == position % 5


def test_a_float32_map_is_summed_in_float64():
    lin = loclin.linearize(tiny.llama(dtype=torch.float32), tiny.prompt(5))
    assert torch.allclose(lin.similarity().cosines, slow_cosines(lin.jacobian().dense()), rtol=0, atol=1e-14)


@cache
def sizes_and_cosines(power):
    """Those of a model whose final norm's gain, a factor of the whole map, is scaled by a power of two."""
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight *= 2.0**power
    lin = loclin.linearize(model, tiny.prompt(4), precision="double")
    return lin.jacobian().frobenius_norm(), lin.similarity().cosines


@given(power=st.integers(-60, 60))
@settings(max_examples=5, deadline=None)
def test_a_scaled_map_has_the_same_cosines_bit_for_bit(power):
    (sizes, cosines), (scaled, same) = sizes_and_cosines(0), sizes_and_cosines(power)
    assert torch.equal(scaled, sizes * 2.0**power)
    assert torch.equal(same, cosines)


def test_tokens_behind_the_position_have_zero_rows():
    cosines = loclin.linearize(tiny.llama(), tiny.prompt(5)).similarity(position=2).cosines
    assert not cosines[3:].any()
    assert not cosines[:, 3:].any()
    assert torch.allclose(cosines.diagonal(), torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))


def test_a_map_beyond_the_budget_is_not_held(monkeypatch):
    monkeypatch.setattr(Chain, "column_bytes", lambda *_: 1000)  # a real column of a tiny model is as large as its map
    ids = tiny.prompt(5)
    lin = within(tiny.llama(), ids, 20_000)
    found, expected = lin.similarity(), loclin.linearize(tiny.llama(), ids).similarity()
    assert lin.jacobian().cached_dense is None
    assert torch.allclose(found.cosines, expected.cosines, rtol=0, atol=1e-13)


def test_the_table_has_every_pair_once(directory):
    lin = loclin.linearize(loclin.load(str(directory)), "w3 w4 w5 w6")
    found, told = lin.similarity(), []
    table = found.table()
    rows = list(zip(table["token"], table["other"], strict=True))
    assert list(table) == ["token", "text", "other", "other_text", "cosine"]
    assert rows == list(combinations(range(len(lin.tokens)), 2))
    for (i, j), text, other, cosine in zip(rows, table["text"], table["other_text"], table["cosine"], strict=True):
        assert (text, other, cosine) == (lin.tokens[i], lin.tokens[j], float(found.cosines[i, j]))
    assert torch.equal(loclin.similarity(lin, progress=told.append).cosines, found.cosines)
    assert told


def test_one_token_has_no_pairs():
    found = loclin.linearize(tiny.llama(), tiny.prompt(1)).similarity()
    assert found.cosines.tolist() == [[pytest.approx(1)]]
    assert found.table()["cosine"] == []
    assert found.to_html()


@pytest.mark.parametrize("position", [5, -6])
def test_a_position_outside_the_prompt_is_refused(position):
    with pytest.raises(PromptError, match=str(position)):
        loclin.linearize(tiny.llama(), tiny.prompt(5)).similarity(position=position)
