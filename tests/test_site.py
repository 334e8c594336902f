"""The pages that scripts write are as those write them, and the reference has everything that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import loclin
from loclin import figures, freeze, steering

ROOT = Path(__file__).parents[1]
REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
MODULES = {"loclin": loclin, "loclin.figures": figures, "loclin.freeze": freeze, "loclin.steering": steering}
INSIDE = {"loclin.figures", "loclin.freeze", "loclin.steering", "loclin.figures.NAMES"}
"""Modules, whose names are on a page each, and a table that the page of commands is about."""


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    public = {f"{module}.{name}" for name in MODULES[module].__all__}
    assert public - INSIDE <= set(re.findall(r"^::: (\S+)$", REFERENCE, flags=re.M))


def test_the_page_of_commands_is_what_the_commands_say():
    from typer.cli import app

    arguments = ["loclin.cli", "utils", "docs", "--name", "loclin", "--title", "Commands"]
    written = CliRunner().invoke(app, arguments).output
    assert (ROOT / "docs" / "reference" / "commands.md").read_text() == written.rstrip() + "\n", "run: make docs"


def test_the_page_of_benchmarks_is_made_from_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from page import PAGE, write_page

    assert PAGE.read_text() == write_page(), "run: python bench/page.py"


def test_every_page_is_in_the_navigation():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

    def pages(item) -> list[str]:
        if isinstance(item, str):
            return [item]
        return [page for part in (item.values() if isinstance(item, dict) else item) for page in pages(part)]

    named = pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == there


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere_on_github(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and not anchor.startswith("loclin."):  # the site's own: names of the API
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)), link


BROKEN = {
    "a link": ("<a href='there.html'>x</a>", "links to there.html, which is not there"),
    "an anchor": ("<a href='#there'>x</a>", "links to #there, which has no such anchor"),
    "a network": ("<script src='https://cdn.example/x.js'></script>", "loads https://cdn.example/x.js from a network"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_with_a_page_is_found(fault, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".ci")
    from build_site import check

    written, said = BROKEN[fault]
    sound = "<h1 id='here'>x</h1><a href='#here'>y</a><a href='https://x.org'>z</a>"
    (tmp_path / "page.html").write_text(sound)
    assert check(tmp_path) == []
    (tmp_path / "page.html").write_text(sound + written)
    assert check(tmp_path) == [f"page.html {said}"]


def test_docstrings_keep_what_stands_behind_a_name(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / ".ci")
    from docstrings import unfold

    sections = "Parameters\n----------\na, b: first,\n    second.\nc\n    third."
    unfolded = sections.replace(": first", "\n    first")
    notes = "Cost: much.\n\nNotes\n-----\nx: y."
    assert unfold(f"What.\n\n{sections}\n\n{notes}") == f"What.\n\n{notes}\n\n{unfolded}"
