"""A figure of a packaged model, from the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from loclin.cli import app

pytest.importorskip("matplotlib")


@pytest.mark.real
def test_a_figure_of_a_packaged_model(tmp_path):
    path = tmp_path / "out.pdf"
    found = CliRunner().invoke(app, ["figure", "2", "The Golden", "--model", "smollm2-135m", "-o", str(path)])
    assert found.exit_code == 0, found.output
    assert path.read_bytes().startswith(b"%PDF")
