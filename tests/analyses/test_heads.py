"""A head in full and the share of a path: the numbers of their maps."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from loclin.analyses.attribution.target import Direction
from loclin.errors import OptionError
from loclin.linearization import linearize

BUILDS = {"llama": lambda **kw: tiny.llama(biases=True, **kw), "gemma3": tiny.gemma3}


@pytest.fixture(scope="module", params=BUILDS.values(), ids=BUILDS)
def build(request):
    return request.param


@pytest.fixture(scope="module")
def lin(build):
    return linearize(build(), tiny.prompt(6), precision="double")


@pytest.mark.parametrize("position", [-1, 3])
def test_a_head_is_what_attribution_says(build, lin, position):
    found, shares = (
        lin.head(1, 2, 5, k=3, position=position),
        lin.attribute(5, by="head", position=position, in_words=300),
    )
    (same,) = [p for p in shares.parts if p.name == found.name]
    assert found.name == "L1H2"
    assert found.share == pytest.approx(same.share, rel=1e-11)
    assert found.attends.tolist() == pytest.approx(same.attends, rel=1e-10, abs=1e-13)
    assert found.attends.sum().item() + found.bias == pytest.approx(found.share, rel=1e-11)
    with torch.no_grad():
        attentions = build(attn="eager")(input_ids=tiny.prompt(6), output_attentions=True).attentions
    assert found.pattern.tolist() == pytest.approx(attentions[1][0, 2, position].tolist(), abs=1e-6)


def test_all_triples_are_the_head(lin):
    """With as many triples as d_head, what the head writes is the sum of its left vectors times their gains."""
    k = {"llama": 6, "gemma3_text": 8}[lin.model.info.family]
    found = lin.head(2, 0, k=k)
    U = found.map.svd(k, joint=True, tolerance=1e-5).U
    gains = torch.tensor([t.gains for t in found.triples], dtype=U.dtype)
    assert ((U @ gains.sum(1) + found.map.bias - found.map.value).norm() / found.map.value.norm()).item() < 1e-6
    first = found.triples[0]
    norm, head = lin.model.hf.model.norm, lin.model.hf.lm_head.weight
    gain = norm.weight + 1 if lin.model.info.family == "gemma3_text" else norm.weight
    assert first.writes[0][0] == str((head @ (gain * U[:, 0])).argmax().item())
    assert len(first.reads) == len(first.writes) == 8
    read = json.loads(json.dumps(found.to_dict()))
    assert read["name"] == "L2H0"
    assert read["provenance"]["target"] == "attn_out.2 by L2H0"


def test_the_share_of_a_path_is_its_maps(lin):
    found = lin.path(["L0H1", "L2H3"], (5, 9), token=3)
    weights = lin.model.hf.lm_head.weight.detach()
    u = weights[5] - weights[9]
    expected = torch.einsum("o,oti,ti->t", u, found.map.dense(), lin.embeddings)
    assert found.shares.tolist() == pytest.approx(expected.tolist(), rel=1e-10, abs=1e-14)
    assert found.share == found.shares[3].item()
    assert lin.path(["L0H1", "L2H3"], (5, 9)).share == pytest.approx(expected.sum().item(), rel=1e-10)
    read = json.loads(json.dumps(found.to_dict()))
    assert (read["name"], read["token"], read["target"]["kind"]) == ("L0H1 > L2H3", 3, "logit difference")


def test_single_heads_are_paths_of_one(lin):
    """What tokens give by way of each head as the only part: with the other parts it sums to less than the share."""
    heads = [lin.path(["attn_out.0"], 5).share, sum(lin.path([f"L0H{h}"], 5).share for h in range(4))]
    assert heads[0] == pytest.approx(heads[1], rel=1e-11)


def test_mistakes(lin):
    with pytest.raises(OptionError, match="layer 1 has query heads 0 to 3"):
        lin.head(1, 4)
    with pytest.raises(OptionError, match="layers 0 to 2"):
        lin.head(3, 0)
    with pytest.raises(OptionError, match="for targets at final or the logits"):
        lin.head(1, 0, Direction(lin.embeddings[0], at="resid_post.1"))
