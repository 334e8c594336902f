"""Every block of code in docs runs, and prints what stands behind it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import loclin
from loclin.cli import app
from pages import Block, blocks, missing, run

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT / "docs")): blocks(path.read_text()) for path in sorted(ROOT.glob("docs/**/*.md"))}
del PAGES["reference/commands.md"]  # what typer writes; see tests/test_site.py
RUN = ("python", "console")
LONG = {
    *("results", "prompts", "plan", "precision", "comparison", "figures", "layers", "generate", "devices"),
    *("concepts", "steering", "files", "cost"),
}
"""Pages that take a quarter of a minute or more, beside those that most readers open."""


@pytest.fixture(scope="session")
def models() -> dict:
    """The models of all pages, each loaded once."""
    return {}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=[pytest.mark.long] * (Path(name).stem in LONG))
        for name, found in PAGES.items()
        if any(b.language in RUN for b in found)
    ],
)
def test_a_page_prints_what_it_says(page, models, capsys, tmp_path, monkeypatch):
    load = loclin.load

    def once(name, **options):
        key = (str(name), *sorted((option, str(value)) for option, value in options.items() if value is not None))
        return models.get(key) or models.setdefault(key, load(name, **options))

    monkeypatch.setattr("loclin.models.load", once)
    monkeypatch.chdir(tmp_path)  # some blocks write files
    names: dict = {}
    for block in PAGES[page]:
        if block.language == "console":
            check_commands(block.code, monkeypatch)
        elif block.language == "python":
            exec(compile(block.code, page, "exec"), names)
            check(block, capsys.readouterr().out)


def check(block: Block, printed: str) -> None:
    """What a block of Python printed is shown behind it."""
    said = block.printed or ""
    assert not missing(said.splitlines(), printed), printed
    assert said or not printed.strip(), f"the page does not show what this prints:\n{block.code}\n{printed}"


def check_commands(block: str, monkeypatch) -> None:
    """Each command of a block, behind its prompt, prints the lines under it."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, *lines = part.splitlines()
        assert command.startswith("loclin "), command
        assert any(line.strip(" …") for line in lines), f"shows nothing of what it prints: {command}"
        printed = run(command, monkeypatch)
        assert not missing(lines, printed), printed


SHELL = [
    pytest.param(line, id=f"{page}: {line}")
    for page, found in PAGES.items()
    for block in found
    if block.language == "sh"
    for line in block.code.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("line", SHELL)
def test_a_command_that_is_not_run_has_these_options(line):
    program, *arguments = shlex.split(line, comments=True)
    if program == "loclin":
        group = get_command(app)
        command = group.commands[arguments[0]]  # type: ignore[attr-defined]
        command.make_context(arguments[0], arguments[1:], resilient_parsing=False)
    elif program == "python":
        assert (ROOT / arguments[0]).exists()
    elif program == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in arguments if "=" not in target)
    else:
        assert [program, arguments[0]] == ["pip", "install"]


def test_no_block_is_without_a_language():
    known = {*RUN, "text", "sh"}
    assert not [(page, b.code[:60]) for page, found in PAGES.items() for b in found if b.language not in known]
