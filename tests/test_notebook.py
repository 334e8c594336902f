"""The notebooks in docs were run to their ends, and use public names alone; what one of them says is so."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import loclin

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = {"tour": 15, "wrong_answer": 6}
"""The notebooks, and how many results each shows at least."""


@pytest.fixture(params=SHOWN)
def name(request):
    return request.param


@pytest.fixture
def cells(name):
    return [cell for cell in json.loads((DOCS / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_was_run_in_order_without_an_error(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_results_show_themselves(name, cells):
    shown = [output for cell in cells for output in cell["outputs"] if "text/html" in output.get("data", {})]
    assert len(shown) >= SHOWN[name]
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
    assert len({name for name, _ in named}) > 1
    attributes = {"trace", "chain", "input_ids", "model", "gate", "precision"}  # set when it is made
    assert not [one for one in named if not hasattr(homes[one[0]], one[1]) and one[1] not in attributes]


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("name", ["wrong_answer"])
def test_what_is_said_of_the_wrong_answer_is_so(cells, capsys):
    """The neuron is found by the notebook's own cells; without it the answer is another."""
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "cell", "exec"), names)
    assert names["best"].name == "L29N1285"
    found = names["lin"].intervene(names["suspects"], target=(names["wrong"], names["right"]))
    effect = next(effect for effect in found.effects if effect.name == "L29N1285")
    assert found.predicted[0] == " Istanbul"
    assert effect.predicted == " Ank"
    assert effect.frozen == pytest.approx(effect.model, abs=2e-3)
    lost = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()[1] != line.split()[-2]}
    assert {"Italy", "Egypt", "Spain"} <= lost
    assert not {"Japan", "Greece"} & lost
