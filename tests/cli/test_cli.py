"""The command line on a tiny model in a directory: in this process, and as a person starts it where that matters."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import loclin
from loclin.cli import app
from loclin.maps.layer_spectra import LayerSpectra


def start(*arguments, **options):
    command = [sys.executable, "-m", "loclin", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def run(*arguments, stdin=""):
    process = start(*arguments)
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out, err


def here(capsys, *arguments):
    """The command line in this process, where importing torch costs nothing."""
    with pytest.raises(SystemExit) as stopped:
        app(list(map(str, arguments)))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_a_hundred_thousand_tokens(directory, tmp_path, capsys):
    """The model's most is named before anything runs, and nothing is written."""
    written = tmp_path / "out.json"
    code, out, err = here(capsys, "explain", "w3 " * 100_000, "--model", directory, "--json", written)
    assert (code, out) == (2, "")
    assert "100000 tokens" in err
    assert "at most 64" in err
    assert len(err.splitlines()) == 1
    assert not written.exists()


def test_explain(directory, tmp_path):
    written, page = tmp_path / "out.json", tmp_path / "out.html"
    code, out, err = run(
        "explain", "w3 w4 w5 w6", "--model", directory, "--bos", "--k", 2, "--json", written, "--html", page
    )
    assert (code, "error:" in err) == (0, False), err
    assert "EXACT" in out
    assert "bit-identical" in out
    read = json.loads(written.read_text())
    assert [token["text"] for token in read["tokens"]] == ["<s>", " w3", " w4", " w5", " w6"]
    total = sum(token["share"] for token in read["tokens"]) + read["bias_share"]
    assert total == pytest.approx(read["target"]["value"], rel=1e-5)
    assert page.read_text().lower().startswith("<!doctype html>")


@pytest.mark.slow
def test_explain_generate(directory, tmp_path, capsys):
    written, page = tmp_path / "out.json", tmp_path / "out.html"
    common = ("explain", "w3 w4 w5", "--model", directory, "--bos", "--k", 2, "--generate", 2)
    code, out, err = here(capsys, *common, "--json", written, "--html", page)
    assert (code, "error:" in err) == (0, False), err
    read = json.loads(written.read_text())
    assert [step["target"]["text"].replace(" ", "·") in out for step in read["steps"]] == [True, True]
    assert page.read_text().count("<details>") == 2
    code, _, err = here(capsys, *common, "--position", 1)
    assert code == 2
    assert "leave --position out" in err


def test_layers_stay_on_disk(directory, tmp_path, capsys):
    found = []
    for number, more in enumerate(((), ("--stream",))):
        written = tmp_path / f"{number}.json"
        code, _, err = here(capsys, "attribute", "w3 w4 w5", "--model", directory, *more, "--json", written)
        assert (code, "error:" in err) == (0, False), err
        found.append([line for line in written.read_text().splitlines() if '"date"' not in line])
    assert found[0] == found[1]


def test_plan(directory, tmp_path, capsys):
    written = tmp_path / "plan.json"
    common = ("plan", "any/name", "--config-file", directory / "config.json", "--tokens", 5, "--rate-flops", "1e11")
    code, out, err = here(capsys, *common, "--analysis", "dense", "--available", "20KB", "--json", written)
    assert (code, "error:" in err) == (0, False), err
    assert "any/name" in out
    assert "stream=True" in out or "memory" in out
    saved = loclin.Estimate.load(written)
    assert [one.name for one in saved.analyses] == ["linearize", "dense"]
    assert not any(one.fits for one in saved.analyses)
    code, _, err = here(capsys, *common, "--analysis", "sideways")
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.slow
def test_validity(directory, tmp_path, capsys):
    written, page = tmp_path / "out.json", tmp_path / "out.html"
    common = ("validity", "w3 w4 w5", "--model", directory, "--draws", 1, "--swaps", 1)
    code, out, err = here(capsys, *common, "--json", written, "--html", page)
    assert (code, "error:" in err) == (0, False), err
    assert "Random directions" in out
    assert set(json.loads(written.read_text())["curves"]) == {"noise", "near", "random"}
    assert "Plotly" in page.read_text()
    code, _, err = here(capsys, "validity", "w3", "--model", directory, "--draws", 0, "--swaps", 0)
    assert code == 2
    assert "at least one" in err


@pytest.mark.slow
def test_faithfulness(directory, tmp_path, capsys):
    written, tables = tmp_path / "out.json", tmp_path / "out.md"
    common = ("faithfulness", "--model", directory, "--prompts", 4, "--planes", 0, "--json", written)
    code, out, err = here(capsys, *common, "--markdown", tables)
    assert (code, "error:" in err) == (0, False), err
    assert "Removing tokens" in out
    assert "| frozen" in tables.read_text()
    before = written.read_text()
    code, _, err = here(capsys, *common)
    assert (code, written.read_text()) == (0, before)
    assert "has 4 prompts: resuming" in err.replace("\n", " ")


def test_explain_reads_standard_input(directory, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w7 w8")))
    code, out, _ = here(capsys, "explain", "-", "--model", directory, "--gate", "half")
    assert code == 0
    assert "w7" in out


def test_double_precision(directory, tmp_path, capsys):
    written = tmp_path / "out.json"
    code, _, err = here(
        capsys,
        "explain",
        "w3 w4",
        "--model",
        directory,
        "--dtype",
        "float64",
        "--precision",
        "double",
        "--json",
        written,
    )
    assert code == 0, err
    assert json.loads(written.read_text())["certificate"]["reconstruction_error"] < 1e-13


def test_split_says_what_was_decided(directory, tmp_path, capsys):
    written = tmp_path / "out.json"
    code, out, err = here(
        capsys, "explain", "w3 w4", "--model", directory, "--precision", "split", "--json", written, "--top", 1
    )
    assert code == 0, err
    known = json.loads(written.read_text())["provenance"]
    assert known["precision"] == "single"
    assert known["split"] == "left off: weights are not bf16-exact (float32 checkpoint)"
    assert f"split: {known['split']}" in " ".join((out + err).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["w3", "--position", "5"], "position 5 is outside the prompt, which has 1 tokens"),
        (["w3", "--k", "0"], "--k"),
        (["w3", "--k", "25"], "k is 1 to 24"),
        (["w3", "--gate", "sideways"], "sideways"),
        (["w3", "--dtype", "float8"], "float8"),
        (["w3", "--device", "cuda:7"], "cuda:7"),
        (["w3", "--precision", "quadruple"], "quadruple"),
        (["w3", "--memory", "plenty"], "memory='plenty'"),
        (["w3", "--memory", "10"], "it takes at least"),
        (["w3 " * 65], "at most 64"),
        (["w3", "--json", "/nowhere/out.json"], "no directory /nowhere"),
        (["w3", "--html", "/"], "is a directory"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(directory, capsys, arguments, message):
    code, out, err = here(capsys, "explain", *arguments, "--model", directory)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("target", [["--target", "w4"], ["--target-id", "6"]])
def test_attribute(directory, tmp_path, capsys, target):
    written, page = tmp_path / "out.json", tmp_path / "out.html"
    levels = ("--by", "token", "--by", "token x layer", "--by", "head")
    files = ("--json", written, "--html", page)
    code, out, err = here(capsys, "attribute", "w3 w4 w5", *target, "--model", directory, *levels, *files)
    assert code == 0, err
    assert "logit ·w4" in out
    assert out.count("shares sum to") == 3
    read = json.loads(written.read_text())
    assert list(read) == ["token", "token×layer", "head"]
    for level in read.values():
        assert sum(row["share"] for row in level["parts"]) == pytest.approx(level["target"]["value"], rel=1e-5)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_attribute_shares_out_other_things(directory, capsys):
    for options, kind in (
        ([], "logit "),
        (["--target", "w4", "--against", "w5"], "logit difference ·w4 − ·w5"),
        (["--target", "w4 w6", "--against", "w5"], "difference in sum of logits ·w4, ·w6 − ·w5"),
        (["--generated", "2", "--against", "w5 w6"], "difference in sum of logits"),
        (["--margin", "runner-up"], "logit margin"),
        (["--target", "w4", "--margin", "others"], "logit over the others ·w4"),
        (["--neuron", "L1N7", "--by", "all"], "neuron L1N7"),
        (["--target", "w4 w5 w3"], "sum of logits ·w4, ·w5, ·w3"),
        (["--target", "w4", "--log-probability"], "log-probability ·w4"),
        (["--target", "w4", "--probability", "--by", "layer"], "probability ·w4"),
        (["--generated", "2", "--margin", "mean"], "sum of logits over the mean"),
        (["--group", "word", "--skip", "special"], "each word's tokens"),
        (["--group-pattern", "w3 w4", "--by", "bias"], "other·tokens"),
    ):
        code, out, err = here(capsys, "attribute", "w3 w4 w5", "--model", directory, *options)
        assert code == 0, err
        assert kind in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "w3 w4", "--position", "0"], "leave position out"),
        (["--generated", "2", "--target", "w3"], "--target and --generated exclude one another"),
        (["--margin", "mean", "--probability"], "--margin and --probability exclude one another"),
        (["--group", "word", "--group-pattern", "x"], "--group and --group-pattern exclude one another"),
        (["--group-pattern", "("], "give a regular expression"),
        (["--group-pattern", "zebra"], "matches nothing in the prompt"),
        (["--chat"], "has no chat template"),
        (["--system", "w3"], "add --chat"),
        (["--target-id", "61"], "the model's tokens are 0 to 60"),
        (["--by", "sideways"], "choose one of token, layer, head, neuron, bias, token×layer"),
        (["--against", "w3"], "--against needs --target"),
        (["--target", "w3", "--against", "w4", "--margin", "others"], "exclude one another"),
        (["--neuron", "7"], "write L17N80"),
        (["--neuron", "L1N40"], "layer 1 has neurons 0 to 39"),
        (["--neuron", "L3N1"], "the model has layers 0 to 2"),
        (["--neuron", "L1N1", "--target", "w3"], "--neuron stands alone"),
        (["--position", "3"], "position 3 is outside the prompt"),
        (["--html", "/nowhere/out.html"], "no directory /nowhere"),
    ],
)
def test_mistakes_of_attribute_are_one_clear_line(directory, capsys, arguments, message):
    code, out, err = here(capsys, "attribute", "w3 w4 w5", "--model", directory, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert out == ""


def test_unknown_models_suggest_near_names(capsys):
    code, _, err = here(capsys, "explain", "hello", "--model", "smollm2-135")
    assert code == 2
    assert "smollm2-135m" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("seconds", [1.5, 2.0])
def test_an_interrupted_run_leaves_no_file(directory, tmp_path, seconds):
    page = tmp_path / "out.html"
    prompt = " ".join(["w3"] * 60)
    process = start("explain", prompt, "--model", directory, "--html", page, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_and_version():
    code, out, _ = run("--help")
    assert code == 0
    assert "explain" in out
    assert run("explain", "--help")[0] == 0
    assert run("--version")[1].startswith("loclin ")


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['loclin']; import loclin.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_models_lists_and_removes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path))
    code, out, _ = here(capsys, "models")
    assert code == 0
    assert "gemma-3-270m (default)" in out
    code, _, err = here(capsys, "models", "remove", "nothing")
    assert code == 2
    assert "nothing" in err


def test_layers(directory, tmp_path, capsys):
    written, page, saved = (tmp_path / name for name in ("layers.json", "layers.html", "layers.safetensors"))
    files = ("--json", written, "--html", page, "--save", saved)
    code, out, err = here(capsys, "layers", "w3 w4 w5", "--model", directory, "-k", 3, "--component", "mlp_out", *files)
    assert code == 0, err
    assert "EXACT" in out
    read = json.loads(written.read_text())
    assert [component["name"] for component in read["components"]] == ["mlp_out"]
    assert page.read_text().startswith("<!doctype html>")
    assert LayerSpectra.load(saved).S.shape == (1, 3, 3, 3)
    code, _, err = here(capsys, "layers", "w3", "--model", directory, "--save", tmp_path / "layers.npy")
    assert code == 2
    assert "call it" in err


def test_explore(directory, tmp_path, capsys):
    page, saved = tmp_path / "explore.html", tmp_path / "explore.safetensors"
    files = ("--html", page, "--save", saved, "--word", "w9")
    code, out, err = here(capsys, "explore", "w3 w4 w5", "--model", directory, "--count", 9, *files)
    assert code == 0, err
    assert "EXACT" in out
    found = loclin.Exploration.load(saved)
    assert found.words[0].strip() == "w9"
    assert len(found.words) == 9
    assert found.to_html() == page.read_text("utf-8")
    code, _, err = here(capsys, "explore", "w3", "--model", directory, "--word", "no such word")
    assert code == 2
    assert "not one" in err


def test_coverage(tmp_path, capsys):
    record, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    chosen = ("--family", "llama", "--family", "gemma4_assistant", "--gate", "up", "--json", record)
    code, out, err = here(capsys, "coverage", *chosen, "--markdown", page)
    assert code == 0, err
    assert "2 families: 1 exact, 1 not built, 0 error" in out
    assert {result["family"] for result in json.loads(record.read_text())["results"]} == {"llama", "gemma4_assistant"}
    assert "| llama | `LlamaForCausalLM` |" in page.read_text()


def test_faults_found_by_coverage_are_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr("loclin.analyses.coverage.run.Linearized.at", lambda *_, **__: 1 / 0)
    code, out, _ = here(capsys, "coverage", "--family", "llama")
    assert code == 1
    assert "llama error: ZeroDivisionError: division by zero" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "gema3_text"], "did you mean gemma3_text"),
        (["--gate", "sideways"], "sideways"),
        (["--json", "/nowhere/out.json"], "no directory /nowhere"),
        (["--markdown", "/"], "is a directory"),
        (["--json", "DAMAGED"], "cannot resume"),
    ],
)
def test_mistakes_of_coverage_are_one_clear_line(tmp_path, capsys, arguments, message):
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"kind":')
    code, out, err = here(capsys, "coverage", *(damaged if value == "DAMAGED" else value for value in arguments))
    assert code == 2
    assert message in err
    assert out == ""
    assert damaged.read_text() == '{"kind":'


def test_interrupted_coverage_keeps_what_is_finished(tmp_path):
    record = tmp_path / "coverage.json"
    process = start("coverage", "--json", record, start_new_session=True)
    for _ in range(600):
        if record.exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert len(json.loads(record.read_text())["results"]) > 0
    assert list(tmp_path.iterdir()) == [record]


def test_disrupt_and_recover(directory, tmp_path, capsys):
    """On what the tiny model itself says next, interrupted by nothing and gone on with; then its mistakes."""
    model, items = loclin.load(directory), []
    for text in ("w3 w4 w5", "w9 w8 w7 w6"):
        answer = int(model.hf(model.encode(text, bos=True)).logits[0, -1].argmax())
        items.append({"prompt": text, "answer": model.decode([answer])})
    data, written, page = tmp_path / "items.json", tmp_path / "study.json", tmp_path / "study.md"
    data.write_text(json.dumps(items))
    common = ("faithfulness", "--protocol", "dpa", "--model", directory, "--bos", "--data", data, "--json", written)
    code, out, err = here(capsys, *common, "--items", 1)
    assert code == 0, err
    assert "1 items that the model answers" in " ".join(out.split())
    code, out, err = here(capsys, *common, "--markdown", page)
    assert code == 0, err
    assert "going on" in err
    assert "(= AttnLRP, DPA)" in page.read_text()
    for arguments, message in (
        (("--protocol", "dpa"), "needs --data"),
        (("--data", data), "only for --protocol dpa"),
        (("--protocol", "dpa", "--data", data, "--planes", "3"), "only for --protocol removal"),
        (("--protocol", "dpa", "--data", tmp_path / "none.json"), "cannot read"),
    ):
        code, _, err = here(capsys, "faithfulness", "--model", directory, *arguments)
        assert code == 2
        assert message in " ".join(err.split())


def test_intervene_and_compare(directory, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = here(
        capsys, "intervene", "w3 w4 w5", "--model", directory, "--head", "L1H2", "--neuron", "L0N3", "--component",
        "mlp_out.1", "--token", "1", "--zero", "--target", "w4", "--html", page,
    )  # fmt: skip
    assert code == 0, err
    assert "model says" in out
    assert [name for name in ("L1H2", "L0N3", "mlp_out.1", "T1 ·w4") if name not in out] == []
    assert "Interventions" in page.read_text()
    code, out, err = here(capsys, "intervene", "w3 w4 w5", "--model", directory, "--token", "1", "--patch", "w3 w6 w5")
    assert code == 0, err
    code, out, err = here(
        capsys, "patch", "w3 w4 w5", "w3 w6 w5", "--model", directory, "--verify", "1", "--target", "w4", "--html", page
    )
    assert code == 0, err
    assert "model says" in out
    assert "Residual stream" in page.read_text()
    code, out, err = here(capsys, "compare", "w3 w4 w5", "w3 w6 w7 w5", "--model", directory, "--target", "w9")
    assert code == 0, err
    assert "content" in out
    code, out, err = here(capsys, "compare", "w3 w4 w5", "--other-model", directory, "--model", directory)
    assert code == 0, err
    assert "+0.000" in out


def test_attention_and_units(directory, capsys, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "out.json"
    code, out, err = here(
        capsys, "attention", "w3 w4 w5", "--model", directory, "--head", "L1H2", "--key", "1", "--by", "token", "--by",
        "layer", "--group", "word", "--html", page, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    assert "attends to 1 ·w4" in out
    assert "Layers: what the key reads" in page.read_text()
    found = json.loads(file.read_text())
    assert [*found] == ["token", "layer", "word"]
    assert {one["score"] for one in found.values()} == {one["by_key"]["target"]["value"] for one in found.values()}
    for arguments in (["explain", "w3 w4 w5", "--k", "1"], ["compare", "w3 w4 w5", "w3 w5"]):
        code, out, err = here(capsys, *arguments, "--model", directory, "--group-pattern", "w4|w3", "--skip", "special")
        assert code == 0, err
        assert "other·tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "w3 w4"], "--head"),
        (["attention", "w3 w4", "--head", "15"], "write L3H5"),
        (["attention", "w3 w4", "--head", "L1H9"], "query heads 0 to 3"),
        (["attention", "w3 w4", "--head", "L1H1", "--query", "0", "--key", "1"], "may not attend"),
        (["attention", "w3 w4", "--head", "L1H1", "--by", "verse"], "choose one of token"),
        (["explain", "w3 w4", "--group-pattern", "("], "give a regular expression"),
        (["compare", "w3 w4", "w3", "--align", "word", "--group", "line"], "exclude one another"),
        (["intervene", "w3 w4"], "name what to replace"),
        (["intervene", "w3 w4", "--head", "L1H9"], "0 to 3"),
        (["intervene", "w3 w4", "--head", "15"], "write L3H5"),
        (["intervene", "w3 w4", "--token", "1", "--mean", "--zero"], "--zero and --mean exclude one another"),
        (["intervene", "w3 w4", "--token", "1", "--patch", "w3"], "the prompts have 2 and 1 tokens"),
        (["intervene", "w3 w4", "--token", "1", "--target", "w3 w4"], "linearize the whole text"),
        (["intervene", "w3 w4", "--token", "1", "--target", "w3 w4", "--against", "w5"], "attribute alone"),
        (["patch", "w3 w4", "w3"], "the prompts have 2 and 1 tokens"),
        (["patch", "w3 w4", "w3 w5", "--by", "neuron"], "neuron"),
        (["compare", "w3 w4"], "give another prompt"),
        (["attribute", "w3 w4", "--attention", "shared", "--by", "all"], "leave --by all out"),
        (["attribute", "w3 w4", "--attention", "shared", "--by", "head"], "by='head'"),
        (["compare", "w3 w4", "--other-adapter", "/nowhere"], "no adapter_config.json"),
        (["explain", "w3", "--quantization", "nf4", "--stream"], "stream"),
        (["explain", "[{", "--chat"], "begins like a JSON list of messages"),
    ],
)
def test_mistakes_of_questions_are_one_clear_line(directory, capsys, arguments, message):
    code, _, err = here(capsys, *arguments, "--model", directory)
    assert code == 2
    assert message in " ".join(err.split())
