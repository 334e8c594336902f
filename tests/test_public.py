"""The public names: all documented, all in one list, and what README and docs use is among them."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import loclin
import tiny
from loclin.errors import LoclinError, MissingExtraError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported_for_types():
    """The names that the package imports for type checkers alone."""
    tree = ast.parse(Path(loclin.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name for node in block.body for alias in node.names}


def test_lists_stubs_and_table_agree():
    names = set(loclin.__all__)
    assert len(names) == len(loclin.__all__)
    assert names == imported_for_types() == {*loclin._HOMES, "freeze", "steering"}


@pytest.mark.parametrize("name", loclin.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(loclin, name)
    assert inspect.getdoc(found)
    assert getattr(found, "__name__", name) in (name, f"loclin.{name}")
    if inspect.isclass(found):
        lacking = [
            member
            for member, value in vars(found).items()
            if not member.startswith("_") and callable(getattr(found, member)) and not inspect.getdoc(value)
        ]
        assert not lacking


def test_every_error_is_public():
    kinds = {kind.__name__ for kind in LoclinError.__subclasses__()} | {"LoclinError"}
    assert kinds <= set(loclin.__all__)
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_public_names(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    assert not re.findall(r"from loclin\.(?!steering|freeze)\S+ import", code)
    used = set(re.findall(r"\bloclin\.([A-Za-z_]+)", code))
    used |= {name for names in re.findall(r"from loclin import (.+)", code) for name in re.split(r",\s*", names)}
    assert used <= set(loclin.__all__)


def test_maps_are_applied_by_operators():
    J = loclin.linearize(tiny.llama(), tiny.prompt(4)).jacobian()
    X, u = torch.randn(2, *J.shape[1:]), torch.randn(3, J.shape[0])
    assert torch.equal(J @ X[0], J.matvec(X[0]))
    assert torch.equal(J @ X, J.matmat(X))
    assert torch.equal(J.T @ u[0], J.rmatvec(u[0]))
    assert torch.equal(J.T @ u, J.rmatmat(u))
    assert J.T.T is J


QUESTIONS = ["explain", "explain_layers", "attribute", "logit_lens", "generate", "validity"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_methods_too(name):
    function, method = inspect.signature(getattr(loclin, name)), inspect.signature(getattr(loclin.Linearization, name))
    asked = list(function.parameters.values())[1:]
    assert [(p.name, p.default) for p in method.parameters.values() if p.name not in ("self", "progress")] == [
        (p.name, p.default) for p in asked if p.name != "progress"
    ]
