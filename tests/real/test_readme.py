"""The Python of the README and the guide runs, and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.real


def test_the_lines_of_the_readme(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    exec(compile(code, "README.md", "exec"), {})
    tokens, shape, ranks, words = capsys.readouterr().out.splitlines()
    assert tokens.startswith("['<bos>', 'The', ' Golden', ' Gate'] -> [(' Bridge', 0.58")
    assert shape == "(640, 4, 640) True"
    assert re.findall(r"\d+\.\d\d", ranks) == ["3.31", "7.72", "11.71", "12.82"]
    assert re.findall(r"\('(.*?)'", words) == [" Bridge", "head", "keeper", " Arch"]


def test_every_block_of_the_guide(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some blocks write files
    text = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "guide.md", "exec"), names)
    assert len(blocks) == 13
    shown = capsys.readouterr().out
    assert "torch.Size([8, 576])" in shown
    assert "activation True" in shown
    assert (names["y"] - names["lin"].value("final")[-1]).norm() < 1e-5 * names["y"].norm()
    assert names["some"].shape == (576, 8, 576)
    assert torch.allclose(names["squares"].sqrt(), names["dense"].square().sum((0, 2)).sqrt())
