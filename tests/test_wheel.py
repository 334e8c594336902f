"""The wheel: everything that the package reads is inside, and it works away from the checkout."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
TAG = "v0.1.0"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"loclin/analyses/faithfulness/prompts.json", "loclin/report/assets/base.html"} <= expected
    with ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert expected <= held
    assert all(name.startswith("loclin") for name in held)


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ZipFile(wheel) as archive:
        archive.extractall(place)
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("installed.py"))],
        capture_output=True, text=True, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(place)}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == place / "loclin" / "__init__.py"


@pytest.fixture
def find_faults():
    return runpy.run_path(str(ROOT / ".ci" / "check_release.py"))["find_faults"]


@pytest.fixture
def checkout(tmp_path):
    """As much of a checkout as a release depends on."""
    (tmp_path / "src" / "loclin").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    (tmp_path / "src" / "loclin" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n\n- All of it.\n")
    return tmp_path


def test_a_tag_that_agrees_is_released(find_faults, checkout):
    assert find_faults(TAG, checkout) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pyproject.toml", '[project]\nversion = "0.2.0"\n'),
        ("src/loclin/__init__.py", "version = 1\n"),
        ("CITATION.cff", "version: 0.0.9\n"),
        ("CHANGELOG.md", "## [Unreleased]\n\n- All of it.\n"),
        ("CHANGELOG.md", "## [0.1.0] - 2026-12-01\n\n## [0.0.9] - 2026-11-01\n\n- Less.\n"),
        ("CHANGELOG.md", "## [0.1.0] - soon\n\n- All of it.\n"),
    ],
)
def test_a_tag_that_does_not_is_not(find_faults, checkout, name, text):
    (checkout / name).write_text(text)
    (fault,) = find_faults(TAG, checkout)
    assert fault.startswith(name)


def test_a_tag_has_a_v(find_faults, checkout):
    (fault,) = find_faults("0.1.0", checkout)
    assert "v0.1.0" in fault


def test_this_version_is_the_same_everywhere(find_faults):
    import loclin

    assert all(fault.startswith("CHANGELOG.md") for fault in find_faults(f"v{loclin.__version__}"))
