"""Standard output in any encoding, on a full disk, or with a reader that has gone."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from test_bad_command_lines import process
from test_cli import here

from loclin.cli import streams
from loclin.results import files as output

C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.long_for("latin-1")
@pytest.mark.long_for("cp1252")
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        C_LOCALE,
    ],
    ids=lambda environment: "-".join(environment.values()),
)
def test_an_explanation_in_an_encoding_that_lacks_its_marks(directory, tmp_path, environment):
    page, held = tmp_path / "ü.html", tmp_path / "out.json"
    written = ["--json", str(held), *([] if environment is C_LOCALE else ["--html", str(page)])]
    found = process("explain", "w3 w4", "--model", str(directory), "--bos", "--k", "2", *written, **environment)
    assert found.returncode == 0, found.stderr
    text = found.stdout.decode("ascii" if environment is C_LOCALE else environment["PYTHONIOENCODING"].split(":")[0])
    assert "EXACT reconstruction" in text
    assert "the total is the logit" in text
    assert ">" in text
    assert "\\u2500" not in text
    assert b"stand-ins" in found.stderr
    assert held.read_text("utf-8").startswith("{")


def test_a_prompt_is_the_same_in_every_locale(directory, tmp_path):
    held = [tmp_path / name for name in ("utf8.json", "c.json")]
    for path, environment in zip(held, ({"PYTHONUTF8": "1"}, C_LOCALE), strict=True):
        options = ["--model", str(directory), "--json", str(path)]
        found = process("attribute", "w3 Straße".encode(), *options, **environment)
        assert found.returncode == 0, found.stderr
    one, other = (json.loads(path.read_text("utf-8"))["token"] for path in held)
    assert one["shares"] == other["shares"]
    assert one["provenance"]["tokens"] == other["provenance"]["tokens"]


def test_standard_input_is_utf8_whatever_the_locale_says(monkeypatch):
    for data, encoding, text in (
        ("\ufeffStraße".encode(), "utf-8", "Straße"),
        ("Straße".encode(), "cp1252", "Straße"),
        ("Straße".encode("latin-1"), "cp1252", "Straße"),
        ("Straße".encode(), "ascii", "Straße"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))
        assert streams.read_prompt() == text


def test_stand_ins_are_ascii_and_as_wide_as_what_they_stand_for():
    for character, plain in streams._STAND_INS.items():
        assert plain.isascii()
        assert plain.isprintable()
        assert len(plain) == 1 or character in "↵⇥∞≤≥±"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("arguments", [["models"], ["--version"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        found = subprocess.run(
            [sys.executable, "-m", "loclin", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=300,
            check=False,
        )
    assert found.returncode == 2
    (line,) = found.stderr.decode().splitlines()
    assert re.match(r"error: .*standard output.*No space left on device$", line)


@pytest.mark.parametrize("arguments", [["models"], ["--help"]])
def test_a_reader_that_has_gone_is_no_fault(arguments):
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(
        [sys.executable, "-m", "loclin", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    os.close(write)
    assert (found.returncode, found.stderr) == (streams.BROKEN_PIPE, b"")


def test_a_result_on_a_full_disk_is_one_line_and_no_file(directory, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.Path, "replace", full)
    code, out, err = here(capsys, "attribute", "w3 w4", "--model", directory, "--json", tmp_path / "out.json")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert re.match(rf"error: .*{re.escape(str(tmp_path / 'out.json'))}.*No space left on device$", line)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_what_standard_output_goes_to(directory, tmp_path):
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        found = subprocess.run(
            [sys.executable, "-m", "loclin", "explain", "w3", "--model", str(directory),
             "--json", str(log)],
            stdout=file, stderr=subprocess.PIPE, timeout=300, check=False,
        )  # fmt: skip
    assert found.returncode == 2
    assert b"what is printed" in found.stderr
    assert log.read_bytes() == b""
