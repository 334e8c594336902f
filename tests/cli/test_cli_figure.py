"""`loclin figure` as a person uses it, on a tiny model in a directory."""

from __future__ import annotations

import sys

import pytest
from test_cli import here

import loclin
from loclin.cli.figure import figure
from loclin.figures.names import NAMES

pytest.importorskip("matplotlib")
PROMPT = "w3 w4 w5"


def test_it_writes_a_figure_of_two_models_and_a_table_of_a_saved_result(directory, tmp_path, capsys):
    path, table, saved = tmp_path / "out.svg", tmp_path / "out.md", tmp_path / "layers.json"
    code, out, err = here(capsys, "figure", "3", PROMPT, "--model", directory, "--model", directory, "-o", path)
    assert (code, out) == (0, ""), err
    assert f"wrote {path}" in err.replace("\n", "")
    assert path.read_text().startswith("<?xml")
    lin = loclin.linearize(loclin.load(str(directory)), PROMPT)
    lin.explain_layers(k=3).save(saved)
    code, _, err = here(
        capsys, "figure", "table5", "--saved", saved, "--layers", "1-2", "--highlight", "w7", "-o", table
    )
    assert code == 0, err
    assert table.read_text() == loclin.figures.table_5(lin, layers=[1, 2], highlight=["w7"]).markdown()


def test_the_list_names_each(capsys):
    code, out, _ = here(capsys, "figure", "--list")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == list(NAMES)


def test_without_matplotlib_the_pip_command_is_named(directory, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("canvas", "fonts", "layers", "maps", "tokens"):
        monkeypatch.delitem(sys.modules, f"loclin.figures.{name}", raising=False)
    code, _, err = here(capsys, "figure", "6", PROMPT, "--model", directory, "-o", tmp_path / "out.pdf")
    assert code == 2
    assert 'pip install "loclin[figures]"' in err
    assert not list(tmp_path.iterdir())
    assert figure.__doc__
