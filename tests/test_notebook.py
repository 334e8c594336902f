"""The tour in docs was run to its end, and uses public names alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import loclin

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_was_run_in_order_without_an_error(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_results_show_themselves(cells):
    shown = [output for cell in cells for output in cell["outputs"] if "text/html" in output.get("data", {})]
    assert len(shown) >= 15
    assert not [output for output in shown if "<script" in "".join(output["data"]["text/html"])]


def test_it_uses_public_names(cells):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    homes = {"loclin": loclin, "lin": loclin.Linearization, "J": loclin.LinearMap}
    named = {(name, attribute) for name, attribute in used if name in homes}
    assert {name for name, _ in named} == set(homes)
    attributes = {"trace", "chain", "input_ids", "model", "gate", "precision"}  # set when it is made
    assert not [one for one in named if not hasattr(homes[one[0]], one[1]) and one[1] not in attributes]
