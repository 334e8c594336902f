"""A figure of a packaged model, from the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import loclin
from loclin.cli import app

pytest.importorskip("matplotlib")


@pytest.mark.real
def test_a_figure_of_a_packaged_model(tmp_path):
    path = tmp_path / "out.pdf"
    found = CliRunner().invoke(app, ["figure", "2", "The Golden", "--model", "smollm2-135m", "-o", str(path)])
    assert found.exit_code == 0, found.output
    assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.real
@pytest.mark.long
def test_targets_of_a_packaged_model(tmp_path):
    found = loclin.reproduce("smollm2-135m", tmp_path / "out", ["fig2", "fig3"], progress=False)
    assert (found.passed, found.paper_model, found.compared) == (True, None, [])
    assert found.targets[1].grids[0].rows[0][3] == [("·only", -1)]  # the next token, above those of the paper's models
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/svg+xml") == 2
