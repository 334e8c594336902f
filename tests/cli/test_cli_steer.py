"""`loclin steer` and `loclin watch` as a person uses them, on a tiny model in a directory."""

from __future__ import annotations

import json
from html import escape

import pytest
from test_cli import here

from loclin.steering import Operator

PROMPT, TOWARD = "w3 w4 w5 w6", "w7 w8 w9"


def test_steer(directory, tmp_path, capsys):
    written, page, kept = tmp_path / "out.json", tmp_path / "out.html", tmp_path / "op.safetensors"
    options = ["--model", directory, "--words", "w9, w12", "--tokens", 5, "--bos"]
    code, out, err = here(
        capsys, "steer", PROMPT, "--toward", TOWARD, *options, "--json", written, "--html", page, "--save", kept
    )
    assert code == 0, err
    assert "normal" in out
    assert "steered" in out
    read = json.loads(written.read_text())
    assert read["words"] == ["w9", "w12"]
    assert {trial["layer"] for trial in read["sweep"]["trials"]} == {0, 1}
    allowed = [trial for trial in read["sweep"]["trials"] if trial["kl"] <= read["sweep"]["max_kl"]]
    assert [trial for trial in read["sweep"]["trials"] if trial["written"]] == allowed
    limit, normal = max(0.3, read["normal"]["repetition"]), read["normal"]["frequency"]
    moved = [trial for trial in allowed if trial["written"]["frequency"] > normal] or allowed
    fluent = [trial for trial in moved if trial["written"]["repetition"] <= limit]
    assert fluent
    best = max(fluent, key=lambda trial: (trial["written"]["frequency"], trial["gain"]))
    assert read["sweep"]["best"] == best
    assert (read["layer"], read["strength"]) == tuple(read["sweep"]["best"][name] for name in ("layer", "strength"))
    html = page.read_text()
    assert html.lower().startswith("<!doctype html>")
    assert "Plotly" in html
    moved = read["steered"]["frequency"] > read["normal"]["frequency"]
    assert moved == (not any("w9, w12" in warning for warning in read["warnings"]))
    for warning in read["warnings"]:
        assert escape(warning) in html
        assert warning in " ".join(out.replace("│", " ").split())
    again = tmp_path / "again.json"
    fixed = ["--operator", kept, "--strength", read["strength"], "--json", again]
    code, _, err = here(capsys, "steer", PROMPT, *options, *fixed)
    assert code == 0, err
    second = json.loads(again.read_text())
    assert second["steered"] == read["steered"]
    assert second["toward"] == ["w7 w8 w9"]
    assert Operator.load(kept).point == f"resid_post.{read['layer']}"


@pytest.mark.parametrize("method", ["published", "basis", "suffix", "activation", "mean", "random"])
def test_unsteered_by_every_method(directory, tmp_path, capsys, method):
    written = tmp_path / "out.json"
    code, _, err = here(
        capsys, "steer", PROMPT, "--toward", TOWARD, "--model", directory, "--words", "w9", "--tokens", 4,
        "--layer", 1, "--strength", 0, "--method", method, "--seed", 3, "--json", written,
    )  # fmt: skip
    assert code == 0, err
    read = json.loads(written.read_text())
    assert read["normal"] == read["steered"]
    assert read["gain"] == read["kl"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to steer towards"),
        (["--toward", TOWARD], "words="),
        (["--toward", TOWARD, "--words", "absent"], "no token"),
        (["--toward", TOWARD, "--words", "w9", "--layer", 7], "layers 0 to 2"),
        (["--toward", TOWARD, "--words", "w9", "--chat"], "no chat template"),
        (["--toward", TOWARD, "--words", "w9", "--layer", 1, "--strength", 1e38], "smaller strength"),
        (["--operator", "absent.safetensors"], "no such file"),
        (["--toward", TOWARD, "--save", "absent/op.safetensors"], "no directory"),
    ],
)
def test_mistakes_of_steer(directory, capsys, arguments, message):
    code, _, err = here(capsys, "steer", PROMPT, "--model", directory, *arguments)
    assert code == 2
    assert message in err


def test_another_models_operator(directory, tmp_path, capsys):
    kept = tmp_path / "op.safetensors"
    common = ["--model", directory, "--words", "w9", "--strength", 0.5, "--tokens", 2]
    assert here(capsys, "steer", PROMPT, "--toward", TOWARD, *common, "--layer", 1, "--save", kept)[0] == 0
    for option in (["--dtype", "float64"], ["--gate", "up"]):
        code, _, err = here(capsys, "steer", PROMPT, "--operator", kept, *common, *option)
        assert code == 2
        assert "make it again" in err


def test_watch(directory, tmp_path, capsys):
    words, written = tmp_path / "words.txt", tmp_path / "out.json"
    words.write_text("\n".join(f"w{i}" for i in range(30)), encoding="utf-8-sig")  # as editors on Windows write it
    common = ["--model", directory, "--words", words]
    code, out, err = here(capsys, "watch", PROMPT, *common, "--top", 1, "--k", 3, "--json", written)
    assert code == 0, err
    read = json.loads(written.read_text())
    assert read["words"][0] == "w0", "no byte order mark"
    assert read["searched"] in (9, 12)
    assert len(read["hits"]) == sum(hit["writes"][0] in hit["watched"] for hit in read["hits"]) > 0
    assert f"{len(read['hits'])} of {read['searched']} singular vectors" in out
    assert read["elsewhere"]["prompts"] == 10
    assert here(capsys, "watch", PROMPT, *common, "--layer", 1, "--k", 2)[0] == 0
    words.write_text("\n")
    for path, message in ((words, "is empty"), (tmp_path / "absent", "cannot read")):
        code, _, err = here(capsys, "watch", PROMPT, "--model", directory, "--words", path)
        assert code == 2
        assert message in err


def test_the_published_operator_is_found_kept_and_used_again(directory, tmp_path, capsys):
    written, kept = tmp_path / "out.json", tmp_path / "op.safetensors"
    common = ["--model", directory, "--words", "w9, w12", "--tokens", 4, "--json", written]
    code, _, err = here(capsys, "steer", PROMPT, "--toward", TOWARD, *common, "--method", "published", "--save", kept)
    assert code == 0, err
    first = json.loads(written.read_text())
    assert first["method"] == "published"
    assert first["provenance"]["target"] == f"resid_pre.{first['layer']}"
    held = Operator.load(kept)
    assert held.published
    assert (held.target, held.point) == (f"resid_post.{first['layer']}", f"resid_pre.{first['layer']}")
    code, out, err = here(capsys, "steer", PROMPT, "--operator", kept, "--strength", first["strength"], *common)
    assert code == 0, err
    second = json.loads(written.read_text())
    assert (second["method"], second["steered"]) == ("published", first["steered"])
    assert "published" in out
