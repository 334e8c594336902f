"""The public names: all documented, all in one list, and what README and docs use is among them."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import loclin
import tiny
from loclin.errors import LoclinError, MissingExtraError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported_for_types():
    """The names that the package imports for type checkers alone, and the modules that they come from."""
    tree = ast.parse(Path(loclin.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_the_list_the_stubs_and_what_is_imported_agree():
    stubs = imported_for_types()
    assert sorted(stubs) == sorted(loclin.__all__)
    assert set(stubs) <= set(dir(loclin))
    for name, module in stubs.items():
        assert getattr(loclin, name) is getattr(import_module(module), name), name
    with pytest.raises(AttributeError, match="no_such_name"):
        loclin.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", loclin.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(loclin, name)
    assert inspect.getdoc(found)
    assert getattr(found, "__name__", name) in (name, f"loclin.{name}")
    if inspect.isclass(found):
        assert [member for member in dir(found) if own(found, member) and not documented(found, member)] == []
    elif callable(found):
        text = inspect.getdoc(found) or ""
        assert [parameter for parameter in inspect.signature(found).parameters if parameter not in text] == []


def own(kind, member):
    """Whether a public member of a class is a method or property that loclin has written, in it or in its bases."""
    value = inspect.unwrap(getattr(inspect.getattr_static(kind, member), "fget", None) or getattr(kind, member))
    return not member.startswith("_") and callable(value) and str(getattr(value, "__module__", "")).startswith("loclin")


def documented(kind, member):
    return inspect.getdoc(inspect.getattr_static(kind, member))


@pytest.mark.parametrize("room", ["figures", "freeze", "steering"])
def test_every_name_of_a_public_room_is_there_and_documented(room):
    module = getattr(loclin, room)
    assert module.__all__
    found = {name: getattr(module, name) for name in module.__all__}
    written = {name: one for name, one in found.items() if inspect.isclass(one) or inspect.isfunction(one)}
    assert [name for name, one in written.items() if not inspect.getdoc(one)] == []


def test_every_error_is_public():
    kinds, found = [LoclinError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.add(kind.__name__)
    assert found <= set(loclin.__all__)
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_public_names(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    assert not re.findall(r"from loclin\.(?!figures|steering|freeze)\S+ import", code)
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


QUESTIONS = [
    *("attention_score", "attribute", "explain", "explain_layers", "explore", "generate", "logit_lens", "similarity"),
    "validity",
]


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_methods_too(name):
    assert getattr(loclin.Linearization, name) is getattr(loclin, name)
