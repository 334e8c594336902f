"""`loclin reproduce` as a person uses it, on a tiny model in a directory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from test_cli import here

import loclin
from loclin.reproduction import run, targets

pytest.importorskip("matplotlib")
PROMPT = "w3 w4 w5"


def test_a_run_and_what_it_says(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "estimate", partial(loclin.estimate, rate_flops=1e11, rate_memory=1e10))
    out = tmp_path / "out"
    options = ("--model", directory, "--out", out, "--prompt", PROMPT)
    code, shown, err = here(capsys, "reproduce", "table5", "table1", *options)
    assert code == 0, err
    assert "[plan] 2 to make: needs about" in err
    assert "[2/2] table5: made in" in err
    assert f"wrote {out / 'index.html'}" in err.replace("\n", "")
    assert "not comparable: the paper has no figures of this model" in shown
    code, _, err = here(capsys, "reproduce", "table1", *options)
    assert code == 0
    assert "[plan]" not in err
    assert "[1/1] table1: done before" in err
    code, _, err = here(capsys, "reproduce", "table1", *options, "--gate", "up")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--fresh" in err


def test_an_interrupted_run_says_that_it_goes_on(directory, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_plan", lambda *_: None)
    monkeypatch.setitem(targets.TARGETS, "table1", replace(targets.TARGETS["table1"], make=interrupt))
    code, out, err = here(capsys, "reproduce", "table1", "--model", directory, "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert "what is finished is kept: the same command goes on" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x"], "name targets, or give --all"),
        (["fig3", "--all", "--out", "x"], "name targets, or give --all"),
        (["fig3"], "name the folder: --out DIR"),
        (["fig33", "--out", "x"], "did you mean fig3"),
        (["fig3", "--out", "x", "--task", "masked"], "leave --decoder, --image and --task out"),
        (["fig3", "--out", "/proc/nowhere"], "cannot make the folder"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = here(capsys, "reproduce", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_exit_codes_are_in_the_help(capsys):
    _, out, _ = here(capsys, "reproduce", "--help")
    assert "a published figure differs" in " ".join(out.split())
