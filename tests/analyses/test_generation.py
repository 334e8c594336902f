"""Generated tokens are the model's own; drifts are those of dense maps; every step is exact."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

import tiny
from loclin import compare
from loclin.analyses.explain import explain
from loclin.analyses.generation import generate
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.results import display

BUILDS = {"llama": tiny.llama, "gemma3": tiny.gemma3}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def lin(request):
    return linearize(request.param(), tiny.prompt(5), gate="half", precision="double")


@pytest.mark.sampled(1)
def test_steps_are_greedy_and_exact(lin):
    found = generate(lin, 4, k=2)
    ids = lin.model.hf.generate(lin.input_ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert [step.target["id"] for step in found.steps] == ids[0, 5:].tolist()
    assert found.text == " ".join(str(token) for token in ids[0, 5:].tolist())
    for number, step in enumerate(found.steps):
        assert step.certificate.passed
        assert step.provenance.token_ids == ids[0, : 5 + number].tolist()
        assert step.provenance.gate == "half"
        alone = explain(linearize(lin.model, ids[:, : 5 + number], gate="half", precision="double"), k=2)
        same = compare(step, alone)
        assert same.differences == {}
        assert set(same.errors.values()) == {0.0}
        assert [token.blocks for token in step.tokens] == [token.blocks for token in alone.tokens]


@pytest.mark.sampled(1)
def test_drift_is_that_of_the_dense_maps(lin):
    found = generate(lin, 3, k=2)
    ids = torch.tensor([[*lin.input_ids[0].tolist(), *(step.target["id"] for step in found.steps)]])
    maps = [linearize(lin.model, ids[:, : 5 + n], gate="half", precision="double").jacobian().dense() for n in range(3)]
    assert [len(step) for step in found.drift] == [5, 6]
    for step, old, new in zip(found.drift, maps, maps[1:], strict=False):
        for i, token in enumerate(step):
            a, b = old[:, i], new[:, i]
            assert token.change == pytest.approx(((b - a).norm() / a.norm()).item())
            assert token.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item())
            one, other = torch.linalg.svd(a), torch.linalg.svd(b)
            for angle, u, v in ((token.writes, one.U[:, 0], other.U[:, 0]), (token.reads, one.Vh[0], other.Vh[0])):
                assert angle == pytest.approx(math.degrees(math.acos(min(1.0, abs((u @ v).item())))), abs=1e-3)


@pytest.mark.slow
def test_it_ends_where_the_model_ends(lin):
    end = generate(lin, 2, k=1).steps[1].target["id"]
    config = lin.model.hf.generation_config
    before, config.eos_token_id = config.eos_token_id, [end]
    try:
        found = generate(lin, 9, k=1)
    finally:
        config.eos_token_id = before
    assert len(found.steps) <= 2
    assert found.steps[-1].target["id"] == end


def test_mistakes_are_refused_before_the_work(lin):
    with pytest.raises(OptionError, match="whole number from 1"):
        generate(lin, 0)
    with pytest.raises(PromptError, match="takes at most 64"):
        generate(lin, 61)


@pytest.mark.slow
def test_json_page_and_terminal(lin):
    found = generate(lin, 3, k=2)
    read = json.loads(found.to_json())
    assert len(read["steps"]) == 3
    assert len(read["drift"]) == 2
    assert set(read["drift"][0][0]) == {"change", "cosine", "writes", "reads"}
    page = display.page(found)
    assert page.count("<details>") == 3
    assert page.count('"green">exact') == 6
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    console = Console(width=140, record=True, file=io.StringIO())
    display.show(found, console)
    shown = console.export_text()
    assert all(step.target["text"] in shown for step in found.steps)
    assert f"{sorted(token.change for token in found.drift[0])[2]:.2f}" in shown


@pytest.mark.slow
def test_text_from_a_model_is_never_markup(lin):
    found = generate(lin, 2, k=1)
    found.steps[0].target["text"] = "<script>alert(1)</script>"
    assert "<script" not in display.page(found)
