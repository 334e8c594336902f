"""Every family is tried, nothing that goes wrong is hidden, and an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from loclin.analyses.coverage import run as room
from loclin.analyses.coverage.describe import Description, describe_parts
from loclin.analyses.coverage.result import Coverage, FamilyResult, Run
from loclin.analyses.coverage.run import certify_family, coverage
from loclin.errors import NotExactError, OptionError, OutputError
from loclin.linearization import linearize
from loclin.maps.certificate import Culprit
from loclin.models import tiny, wrap
from loclin.report.coverage import coverage_markdown
from loclin.results import display


@pytest.fixture(scope="module")
def passed():
    """A certificate that passed."""
    lin = linearize(wrap(tiny.build("llama")), torch.tensor([[3, 4, 5]]), precision="double")
    return dataclasses.replace(lin.certify(), bit_identical=True)


@pytest.fixture
def certificates(monkeypatch, passed):
    """Let the certificate of each run be what a test says: a dict of changes, or an exception."""
    outcomes = {}

    def linearize(model, _ids, *, gate, precision):
        dtype = model.info.dtype
        assert (precision == "double") == (dtype == "float64")
        outcome = outcomes.get((dtype, gate), outcomes.get("all", {}))
        if isinstance(outcome, BaseException):
            raise outcome
        return SimpleNamespace(certify=lambda: dataclasses.replace(passed, **outcome))

    monkeypatch.setattr(room.Linearized, "at", linearize)
    return outcomes


def culprit(module):
    values = {"module": module, "kind": "MLP", "error": 0.5, "operation": "tanh", "line": "modeling.py:12"}
    return Culprit(**{field.name: values[field.name] for field in dataclasses.fields(Culprit)})


@pytest.fixture(scope="module")
def real():
    """A few families through the whole engine, one gate split."""
    return coverage(["llama", "gemma3_text", "qwen2", "gpt2", "mamba", "gemma4_assistant"], gates=["up"])


def test_real_families(real):
    found = {result.family: result for result in real.results}
    assert list(found) == sorted(found)
    assert {name: found[name].status for name in ("llama", "gemma3_text", "qwen2", "gemma4_assistant")} == {
        "llama": "exact",
        "gemma3_text": "exact",
        "qwen2": "affine",
        "gemma4_assistant": "not built",
    }
    assert real.counts["error"] == 0
    for name in ("llama", "gemma3_text", "qwen2"):
        assert found[name].passed == 2
        assert found[name].worst("float64") < 1e-12
        assert found[name].worst("float32") < 3e-5
        assert found[name].forward_error("float32") == 0
        assert found[name].reason == ""
    assert found["qwen2"].bias_share > 1e-3
    assert "drafts" in found["gemma4_assistant"].reason
    for name in ("gpt2", "mamba"):
        assert found[name].status in ("exact", "affine", "refused")
        assert (found[name].reason != "") == (found[name].status == "refused")


def test_the_callers_threads_stay(monkeypatch):
    before, during = torch.get_num_threads(), []
    monkeypatch.setattr(room, "certify_family", lambda *_: during.append(torch.get_num_threads()) or RESULTS[0])
    torch.set_num_threads(2)
    try:
        coverage(["llama"])
        assert (during, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_json_holds_everything(real):
    assert Coverage.from_json(real.to_json()) == real
    read = json.loads(real.to_json())
    assert set(read["versions"]) == {"loclin", "torch", "transformers", "python"}
    assert {result["family"]: result["status"] for result in read["results"]}["llama"] == "exact"


def test_a_family_is_exact_affine_or_neither(certificates):
    assert certify_family("llama").status == "exact"
    assert len(certify_family("llama").runs) == 6
    certificates["float32", "half"] = {"bias_share": 1e-3}
    assert certify_family("llama").status == "affine"
    certificates["float32", "half"] = {"culprits": (culprit("layers.1.mlp"), culprit("layers.2.mlp"))}
    refused = certify_family("llama")
    assert (refused.status, refused.passed, refused.failure.module) == ("refused", 5, "layers.1.mlp")
    assert re.fullmatch("float32 half: not linear: MLP.*, error 5.0e-01, and 1 more", refused.reason)
    certificates["float64", "up"] = TypeError("no kernel\nfor this")
    fault = certify_family("llama")
    assert fault.status == "error"
    assert re.fullmatch(r"float64 up: TypeError: no kernel \(run\.py:\d+\)", fault.reason)


@pytest.mark.parametrize("folder", ["loclin", "transformers", "a b", "ü"])
def test_a_fault_is_placed_by_where_the_packages_are_and_not_by_names(monkeypatch, tmp_path, folder):
    """Code of others in a folder of any name is not loclin's; loclin's own is, wherever it lies."""
    code = compile(
        "def linearize(*_args, **_kwargs):\n    raise TypeError('mine')", str(tmp_path / folder / "my.py"), "exec"
    )
    exec(code, namespace := {})
    monkeypatch.setattr(room.Linearized, "at", namespace["linearize"])
    assert re.search(r"mine \(run\.py:\d+\)$", certify_family("llama", ["up"]).reason)


def test_clear_errors_are_refusals_and_all_runs_need_no_names(certificates):
    certificates["all"] = NotExactError("layers.0.mixer is not linear")
    found = certify_family("llama")
    assert (found.status, found.reason, found.passed) == ("refused", "layers.0.mixer is not linear", 0)
    assert found.worst("float64") is found.forward_error("float32") is found.bias_share is None


def test_numbers_that_are_not_finite_survive_json(certificates, passed):
    certificates["all"] = {"reconstruction_error": float("nan"), "bias_share": float("inf")}
    record = coverage(["llama"])
    assert record.results[0].status == "refused"
    assert record.results[0].reason == f"reconstruction error nan is beyond {passed.tolerance:.1e}"
    assert Coverage.from_json(record.to_json()) == record


@pytest.mark.usefixtures("certificates")
def test_a_finished_family_is_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "coverage.json"
    first = coverage(["llama"], path=path)
    assert Coverage.from_json(path.read_text()) == first
    ran = []
    monkeypatch.setattr(room, "certify_family", lambda family, *_: ran.append(family) or certify_family(family))
    both = coverage(["llama", "gpt2"], path=path)
    assert ran == ["gpt2"]
    assert [result.family for result in both.results] == ["gpt2", "llama"]
    assert Coverage.from_json(path.read_text()) == both
    coverage(["llama"], path=path, fresh=True)
    assert ran == ["gpt2", "llama"]
    assert [result["family"] for result in json.loads(path.read_text())["results"]] == ["llama"]


@pytest.mark.usefixtures("certificates")
def test_more_gates_are_run_and_other_versions_start_over(tmp_path):
    path, said = tmp_path / "coverage.json", []
    assert len(coverage(["llama"], gates=["up"], path=path).results[0].runs) == 2
    assert len(coverage(["llama"], path=path, progress=said.append).results[0].runs) == 6
    assert said == [f"0 of 1 families are done in {path}"]
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "0.1"'))
    assert [r.family for r in coverage(["gpt2"], path=path, progress=said.append).results] == ["gpt2"]
    assert said[1:] == [f"{path} was written by other versions, or for another task: starting over"]


@pytest.mark.usefixtures("certificates")
def test_an_interrupted_run_keeps_what_is_finished(tmp_path, monkeypatch):
    path = tmp_path / "coverage.json"

    def interrupted(family, gates, _task):
        if family == "llama":
            raise KeyboardInterrupt
        return certify_family(family, gates)

    monkeypatch.setattr(room, "certify_family", interrupted)
    with pytest.raises(KeyboardInterrupt):
        coverage(["gpt2", "llama"], path=path)
    assert [result.family for result in Coverage.from_json(path.read_text()).results] == ["gpt2"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', '{"kind": "other"}', '{"kind": "loclin coverage", "results": [{}]}']
)
def test_a_damaged_or_foreign_file_is_refused_and_left(tmp_path, text):
    path = tmp_path / "coverage.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="fresh") as caught:
        coverage(["llama"], path=path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_an_unknown_family_is_refused_with_near_names():
    with pytest.raises(OptionError, match="did you mean .*gemma3_text"):
        coverage(["llama", "gema3_text"])


RESULTS = [
    FamilyResult("alpha", "AlphaLM", Description("grouped", "rope", "RMSNorm", "gated silu"), [
        Run("float64", "up", "passed", 2e-16, 1e-7, False, 0.0),
        Run("float32", "up", "passed", 2e-7, 0.0, True, 0.0),
    ]),
    FamilyResult("beta", "BetaLM", Description("full | sliding", "—", "LayerNorm", "—"), [
        Run("float32", "up", "refused", module="layers.0.act_fn", reason="a|b <c> is_not *linear*"),
    ]),
    FamilyResult("delta", not_built="There is no tiny delta here: it needs PIL."),
    FamilyResult("gamma", "GammaLM", None, [Run("float32", "up", "error", reason="TypeError: x")]),
]  # fmt: skip
RECORD = Coverage({"loclin": "1", "torch": "2", "transformers": "3"}, "abc", RESULTS)


def test_markdown():
    page = coverage_markdown(RECORD)
    assert "**4 families: 1 exact, 1 refused, 1 not built, 1 error.**" in page
    assert "loclin 1, torch 2, transformers 3." in page
    numbers = "2/2 | 2.0e-16 | 2.0e-07 | 0 | bit-identical | exact |"
    assert f"| alpha | `AlphaLM` | grouped | rope | RMSNorm | gated silu | {numbers}" in page
    assert "`layers.0.act_fn` | a\\|b \\<c\\> is\\_not \\*linear\\* |" in page
    assert "## Error" in page
    assert "| delta | There is no tiny delta here: it needs PIL. |" in page
    for section in page.split("\n## ")[1:]:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_terminal():
    console = Console(width=120, record=True, file=io.StringIO())
    display.show(RECORD, console)
    text = console.export_text()
    assert re.search(r"alpha +grouped · rope · RMSNorm · gated silu", text)
    assert "beta refused: layers.0.act_fn: a|b <c> is_not *linear*" in text
    assert "4 families: 1 exact, 1 refused, 1 not built, 1 error" in text
    assert [result.family for result in RECORD.only(["beta"]).results] == ["beta"]
    assert dataclasses.replace(RECORD, results=[]).counts["exact"] == 0


@pytest.mark.parametrize("family", ["blt", "cpmant", "inkling2_text", "prophetnet", "xglm", "xlnet"])
def test_networks_of_other_forms_are_exact(family):
    """Byte patches, prompts of the model's own, capped gates, streams, [T, n] layout: with the logits by their map."""
    found = certify_family(family, ["half"])
    assert found.passed == 2, found.reason
    assert found.worst("float64") < 1e-12
    model = tiny.build(family)
    lin = linearize(wrap(model, None), tiny.prompt(model), precision="double")
    J, y = lin.jacobian(target="logits"), lin.value("logits")[-1]
    assert torch.dist(J.matvec(lin.embeddings) + J.bias, y) < 1e-12 * y.norm()
    assert J.matvec(lin.embeddings).norm() > 1e-3 * y.norm()


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("seq2seq", "led"),
        ("seq2seq", "nemo_speechlm"),
        ("masked", "neomme"),
        ("classification", "markuplm"),
        ("classification", "xlnet"),
    ],
)
def test_encoders_of_other_forms_are_exact(task, family):
    """Windows that overlap in memory, two kinds of tokens, low-rank embeddings, many tables of embeddings, [T, n]."""
    if family not in tiny.families(task):
        pytest.skip(f"this transformers has no {family}")
    found = certify_family(family, ["half"], task)
    assert found.passed == 2, found.reason
    assert found.worst("float64") < 1e-12


def test_classes_of_what_a_model_pools_inside_are_refused():
    assert (
        "none of the hidden states that SqueezeBertModel gives"
        in certify_family("squeezebert", ["half"], "classification").reason
    )


@pytest.mark.parametrize(("family", "reason"), [
    ("musicgen", "a row of codes for each"), ("gemma4_assistant", "no map of its own"), ("reformer", "cannot"),
])  # fmt: skip
def test_what_has_no_map_here_is_refused_by_name(family, reason):
    assert reason in certify_family(family, ["half"]).reason


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ("grouped", "rope", "RMSNorm", "gated silu")),
        ("gemma3", ("sliding + full grouped", "rope", "RMSNorm", "gated gelu_pytorch_tanh")),  # no vision tower
        ("gpt2", ("multi-head", "learned", "LayerNorm", "ungated gelu_new")),
        ("bloom", ("multi-head", "ALiBi", "LayerNorm", "ungated bloomgelu")),
        ("gpt_bigcode", ("multi-query", "learned", "LayerNorm", "ungated gelu_pytorch_tanh")),
        ("mamba", ("state space", "—", "RMSNorm", "—")),
        ("deepseek_v3", ("latent", "rope", "RMSNorm", "gated silu, 4 experts")),
        ("qwen3_next", ("full grouped, delta rule", "rope", "RMSNormGated, RMSNorm", "gated silu, 4 experts")),
    ],
)
def test_parts(family, expected):
    model = tiny.build(family, dtype=torch.float32)
    assert dataclasses.astuple(describe_parts(model, tiny.prompt(model))) == expected
    assert not any(module._forward_pre_hooks for module in model.modules())
