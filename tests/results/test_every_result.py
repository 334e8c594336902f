"""Every kind of result is saved, loaded, exported and shown in one way."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor

import loclin
import tiny
from loclin.analyses.coverage.run import certify_family
from loclin.analyses.faithfulness.items import Item
from loclin.analyses.faithfulness.prompts import StudyPrompt
from loclin.errors import ResultError
from loclin.results.result import Result
from loclin.steering import Operator, Vector
from loclin.steering.search import Sweep

NAMES = [
    "AttentionScore", "Attribution", "Certificate", "Comparison", "Coverage", "Disruption", "Estimate", "Explanation",
    "Exploration", "Faithfulness", "Generation", "Head", "Interventions", "LayerExplanation", "LayerSpectra",
    "LogitLens", "Norms", "Operator", "Patching", "Path", "Plan", "Projection", "PromptComparison", "Reproduction",
    "SVD", "Similarity", "Steered", "Sweep", "Validity", "Vector",
    "Watched",
]  # fmt: skip


def answer(model, text):
    """What the model says next."""
    return model.decode([int(model.hf(model.encode(text, bos=True)).logits[0, -1].argmax())])


@pytest.fixture(scope="module")
def results(directory, tmp_path_factory):
    """One of each, by the class's name."""
    model = loclin.load(str(directory))
    lin = loclin.linearize(model, "w3 w4 w5 w6")
    J = lin.jacobian()
    watched = loclin.watch(lin, [f"w{i}" for i in range(60)], k=2, sinks=True, max_new_tokens=2)
    steered = loclin.steer(model, "w3 w4", ["w5 w6"], words=["w9"], max_new_tokens=2, max_kl=1e9)
    vector = loclin.steer(model, "w3", ["w5"], words=["w9"], method="random", layer=1, strength=1.0, max_new_tokens=1)
    family = certify_family("llama", ["activation"])
    found = [
        lin.attribute(by="token×layer"),
        lin.certify(),
        loclin.compare(J.svd(2), J.svd(2)),
        loclin.Coverage({"torch": "1"}, "code", [family]),
        loclin.disruption(model, [Item("one", "w3 w4 w5", answer(model, "w3 w4 w5"), (0, 8))], bos=True),
        loclin.estimate(str(directory), tokens=3, analyses=["attribute"], rate_flops=1e11),
        lin.explain(k=2),
        lin.explore(count=9),
        loclin.faithfulness(model, [StudyPrompt("words", "w3 w4 w5 w6", "held-out")], planes=1),
        lin.generate(2, k=2),
        lin.head(1, 2),
        lin.attention_score("L1H2", by="layer"),
        lin.intervene(["L1H2", "T1"]),
        lin.compare_prompts(loclin.linearize(model, "w3 w5 w6"), 5),
        lin.explain_layers(k=2),
        lin.layer_spectra(k=2),
        lin.logit_lens(),
        J.norms(),
        lin.patch(loclin.linearize(model, "w3 w5 w5 w6"), 5, verify=1),
        lin.path(["L0H1", "L1H2"], token=2),
        J.plan(2),
        loclin.reproduce(model, tmp_path_factory.mktemp("reproduced"), ["table1"], prompt="w3 w4 w5", progress=False),
        J.svd(2),
        lin.similarity(),
        lin.validity(draws=1, swaps=1),
        watched,
        watched.projection,
        steered,
        steered.sweep,
        steered.steering,
        vector.steering,
    ]
    return {type(one).__name__: one for one in found}


def same(a, b):
    """Whether two values are the same, tensors bit for bit; what is not saved aside."""
    if is_dataclass(a):
        names = [field.name for field in fields(a) if not field.metadata.get("saved")]
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_these_are_all(results):
    public = {name for name in loclin.__all__ if isinstance(getattr(loclin, name), type)}
    kinds = {name for name in public if issubclass(getattr(loclin, name), Result)} - {"Result"}
    assert kinds | {kind.__name__ for kind in (Operator, Vector, Sweep)} | {"Projection"} == set(NAMES)
    assert results.keys() == set(NAMES)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", NAMES)
def test_json_comes_back(results, name):
    found = results[name]
    again = type(found).from_json(found.to_json())
    assert same(found, again)
    assert json.loads(found.to_json())["result"] == name
    assert type(found).from_dict(found.to_dict()).to_dict() == found.to_dict()


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_files_come_back(results, name, ending, tmp_path):
    found = results[name]
    found.save(tmp_path / f"result.{ending}")
    assert same(found, type(found).load(tmp_path / f"result.{ending}"))


def test_what_is_too_large_for_json_is_in_tensor_files(results, tmp_path):
    layers, watched = results["LayerExplanation"], results["Watched"]
    for found, part in ((layers, "spectra"), (watched, "projection")):
        assert part not in found.to_dict()
        assert getattr(type(found).from_json(found.to_json()), part) is None
        found.save(tmp_path / "result.safetensors")
        assert same(getattr(type(found).load(tmp_path / "result.safetensors"), part), getattr(found, part))


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_tables(results, name):
    pytest.importorskip("pandas")
    table = results[name].to_dataframe()
    columns = results[name].table()
    assert list(table.columns) == list(columns)
    assert {len(column) for column in columns.values()} == {len(table)}


@pytest.mark.parametrize("name", NAMES)
def test_every_result_shows_itself(results, name, capsys, tmp_path):
    found = results[name]
    assert "<" in found._repr_html_()
    page = found.to_html(tmp_path / "page.html")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert (tmp_path / "page.html").read_text() == page
    found.show()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_result_knows_where_it_is_from_and_warns(results, name):
    found = results[name]
    assert found.warnings == [] or all(isinstance(text, str) for text in found.warnings)
    if name not in ("Comparison", "Coverage", "Disruption", "Estimate", "Faithfulness", "Sweep", "Vector"):
        assert found.provenance.model.family == "llama"
        assert found.provenance.tokens
    if name not in ("Comparison", "Coverage", "Disruption", "Estimate", "Faithfulness", "Sweep", "Vector", "Steered"):
        assert found.warnings == loclin.linearize(tiny_model(found), found.provenance.token_ids).warnings


def tiny_model(found):
    return loclin.load(found.provenance.model.name)


def test_warnings_are_in_every_form(results):
    warned = replace(results["Explanation"], warnings=["a <b>warning</b>"])
    assert warned.to_dict()["warnings"] == ["a <b>warning</b>"]
    for text in (warned._repr_html_(), warned.to_html()):
        assert "a &lt;b&gt;warning&lt;/b&gt;" in text


def test_numbers_that_are_not_finite_come_back(results):
    found = replace(results["SVD"], upper=torch.full_like(results["SVD"].upper, torch.inf), failure=torch.inf)
    again = loclin.SVD.from_json(found.to_json())
    assert again.failure == torch.inf
    assert torch.equal(again.upper, found.upper)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no result"),
        ('{"result": "SVD"}', "holds SVD"),
        ('{"result": "Explanation"}', "missing"),
    ],
)
def test_other_texts_are_refused(text, said, tmp_path):
    with pytest.raises(ResultError, match=said):
        loclin.Explanation.from_json(text)
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=f"{path}.*{said}"):
        loclin.Explanation.load(path)


def test_a_field_of_another_type_is_named(results):
    values = results["Explanation"].to_dict()
    values["tokens"][1]["share"] = "much"
    with pytest.raises(ResultError, match=r"tokens\[1\]\.share"):
        loclin.Explanation.from_dict(values)


def test_an_unknown_dtype_is_refused(results):
    values = results["SVD"].to_dict()
    values["S"]["dtype"] = "float7"
    with pytest.raises(ResultError, match="float7"):
        loclin.SVD.from_dict(values)


@pytest.mark.slow
def test_a_warning_of_any_step_is_in_every_form(results, capsys):
    steps = results["Generation"].steps
    warned = replace(
        results["Generation"], steps=[*steps[:-1], replace(steps[-1], warnings=["late"])], warnings=["late"]
    )
    warned.show()
    assert all("late" in text for text in (capsys.readouterr().out, warned.to_html(), warned._repr_html_()))


def test_results_on_a_map_of_a_prompt_with_a_warning_have_it():
    lin = loclin.linearize(tiny.llama(), tiny.prompt(4))
    lin.prompt_warnings.append("odd")
    J = lin.jacobian()
    for found in (J.svd(1), J.norms(), J.plan(1), J.block(1).svd(1), lin.certify(), lin.layer_spectra(k=1)):
        assert found.warnings == ["odd"]
