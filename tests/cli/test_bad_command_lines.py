"""Every mistake on the command line is one line and exit code 2: no traceback, no box, no file, and no model loaded."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import loclin
from loclin.cli import app, models

PROMPT = "w3 w4 w5"
PROMPTED = ("explain", "layers", "attribute", "attention", "validity", "watch", "steer")
NEEDS = {"attention": ["--head", "L1H1"], "watch": ["--words", "words.txt"], "steer": ["--toward", "w7 w8"]}
"""What a command cannot be called without."""
NOISE = random.Random(0).randbytes(3000)


def called(command: str, *options: object) -> list[object]:
    """A right command line, and what is wrong with it."""
    return [command, PROMPT, *NEEDS.get(command, []), *options]


BEFORE: list[list[object]] = [
    # the parser
    ["explian", PROMPT],
    ["--nope"],
    ["explain"],
    ["explain", PROMPT, "another"],
    ["steer", "--toward", "w3"],
    ["watch", PROMPT],
    ["models", "remove"],
    ["models", "delete", "x"],
    ["explain", PROMPT, "--k"],
    *([command, PROMPT, "--nope"] for command in PROMPTED),
    ["coverage", "--nope"],
    ["faithfulness", "--nope"],
    # numbers that are none, or outside their range
    *(called(command, "--position", "last") for command in ("explain", "layers", "attribute", "validity")),
    called("explain", "--k", "0"),
    called("explain", "--k", "-3"),
    called("explain", "--k", "2.5"),
    called("explain", "--k", "many"),
    called("explain", "--top", "0"),
    called("explain", "--generate", "-1"),
    called("explore", "--count", "0"),
    called("explore", "--word", ""),
    called("layers", "--k", "1"),
    called("layers", "-k", "0"),
    called("attribute", "--top", "0"),
    called("attribute", "--target-id", "-1"),
    called("watch", "--k", "0"),
    called("watch", "--top", "0"),
    called("validity", "--draws", "-1"),
    called("validity", "--swaps", "-1"),
    called("validity", "--seed", "-1"),
    called("validity", "--seed", str(2**70)),
    called("steer", "--tokens", "0"),
    called("steer", "--rank", "0"),
    called("steer", "--seed", "-1"),
    called("steer", "--layer", "middle"),
    *(called("steer", "--max-kl", value) for value in ("-1", "nan", "inf", "much")),
    *(called("steer", "--strength", value) for value in ("nan", "inf", "-inf", "strong")),
    *(called("steer", "--seed", "1", "--temperature", value) for value in ("-1", "0", "nan", "inf")),
    ["plan", "folder", "--tokens", "0"],
    ["plan", "folder", "--tokens", "many"],
    *(["plan", "folder", "--rate-flops", value] for value in ("0", "-1", "nan", "fast")),
    ["faithfulness", "--prompts", "0"],
    ["faithfulness", "--prompts", "100000"],
    ["faithfulness", "--planes", "-1"],
    ["faithfulness", "--seed", "-1"],
    # names that there are not
    called("explain", "--gate", "sideways"),
    called("explain", "--precision", "quadruple"),
    called("layers", "--component", "norm"),
    called("attribute", "--by", "sideways"),
    called("attribute", "--margin", "all"),
    called("attribute", "--neuron", "7"),
    called("steer", "--method", "force"),
    called("steer", "--form", "multiply"),
    ["coverage", "--family", "gema3_text"],
    ["coverage", "--gate", "sideways"],
    *(called("explain", "--memory", value) for value in ("plenty", "0", "-1GB", "1.5", "nan", "9" * 400)),
    # what is empty or no text
    *([command, "", *NEEDS.get(command, [])] for command in PROMPTED),
    *([command, "caf\udce9", *NEEDS.get(command, [])] for command in PROMPTED),
    ["explain", "half \ud83d an emoji"],
    ["explain", "a\0b"],
    called("explain", "--model", ""),
    ["plan"],
    ["plan", ""],
    ["plan", "folder", "--analysis", ""],
    called("explain", "--dtype", ""),
    called("explain", "--device", ""),
    called("explain", "--revision", ""),
    called("explain", "--memory", ""),
    called("attribute", "--target", ""),
    called("attribute", "--target", "\udcff"),
    called("attribute", "--target", "w3", "--against", ""),
    called("attribute", "--by", ""),
    ["steer", PROMPT, "--toward", ""],
    ["steer", PROMPT, "--toward", "\udcff"],
    called("steer", "--words", ""),
    called("steer", "--words", " , ,"),
    called("explain", "--json", ""),
    called("explain", "--json", "-"),
    called("explain", "--json", "caf\udce9.json"),
    called("explain", "--json", "a\0b.json"),
    ["coverage", "--family", ""],
    # files that cannot be read
    ["watch", PROMPT, "--words", "absent.txt"],
    ["watch", PROMPT, "--words", "empty.txt"],
    ["watch", PROMPT, "--words", "binary.txt"],
    ["watch", PROMPT, "--words", "folder"],
    ["steer", PROMPT, "--operator", "absent.safetensors"],
    ["steer", PROMPT, "--operator", "words.txt"],
    ["steer", PROMPT, "--operator", "folder"],
    ["coverage", "--family", "llama", "--json", "words.txt"],
    ["plan", "any", "--config-file", "absent.json"],
    ["plan", "any", "--config-file", "folder"],
    ["plan", "any", "--config-file", "words.txt"],
    ["plan", "folder", "--analysis", "sideways"],
    ["plan", "folder", "--dtype", "float7"],
    ["plan", "folder", "--available", "plenty"],
    ["plan", "folder", "--memory", "plenty"],
    ["plan", "./nothing"],
    # files that cannot be written
    ["plan", "folder", "--json", "absent/out.json"],
    *(called(command, "--json", "absent/out.json") for command in PROMPTED),
    called("explain", "--json", "folder"),
    called("explain", "--json", "words.txt/out.json"),
    called("explain", "--json", "n" * 300),
    called("explain", "--json", "loop.json"),
    called("explain", "--json", "dangling.json"),
    called("explain", "--json", "/proc/out.json"),
    called("explain", "--html", "absent/out.html"),
    called("explore", "--html", "absent/out.html"),
    called("explore", "-o", "-"),
    called("explore", "--save", "out.npy"),
    called("layers", "--save", "out.npy"),
    called("watch", "--save", "absent/out.safetensors"),
    called("steer", "--save", "out.bin"),
    called("steer", "--save", "facts.safetensors"),
    ["faithfulness", "--markdown", "absent/out.md"],
    ["coverage", "--markdown", "folder"],
    # one file for two
    *(called(c, "--json", "out", "--html", "out") for c in ("explain", "layers", "attribute", "validity", "steer")),
    called("explain", "--json", "out", "--html", "./folder/../out"),
    called("explain", "--json", "real.json", "--html", "link.json"),
    called("explain", "--json", "real.json", "--html", "hard.json"),
    called("layers", "--json", "out.safetensors", "--save", "out.safetensors"),
    called("explore", "--html", "out.safetensors.json", "--save", "out.safetensors"),
    called("layers", "--html", "out.safetensors.json", "--save", "out.safetensors"),
    called("watch", "--json", "words.txt"),
    called("watch", "--json", "./words.txt"),
    called("explain", "--model", "folder", "--json", "folder/config.json"),
    called("explain", "--model", "weights.gguf", "--html", "weights.gguf"),
    ["steer", PROMPT, "--operator", "facts.safetensors", "--save", "facts.safetensors"],
    ["coverage", "--json", "out", "--markdown", "out"],
    ["faithfulness", "--json", "out", "--markdown", "out"],
    # options that contradict one another
    called("attribute", "--target", "w3", "--target-id", "4"),
    called("attribute", "--margin", "others", "--against", "w4", "--target", "w3"),
    called("attribute", "--against", "w4"),
    called("attribute", "--neuron", "L1N1", "--target", "w3"),
    called("attribute", "--neuron", "L1N1", "--target-id", "0"),
    called("explain", "--k", "2", "--top", "3"),
    called("explain", "--generate", "2", "--position", "1"),
    called("explain", "--generate", "2", "--top", "1"),
    *(called(command, "--device", "cpu", "--device-map", "auto") for command in PROMPTED),
    called("explain", "--stream", "--device-map", "auto"),
    called("validity", "--draws", "0", "--swaps", "0"),
    ["steer", PROMPT],
    called("steer", "--operator", "words.txt"),
    ["steer", PROMPT, "--operator", "words.txt", "--layer", "1"],
    ["steer", PROMPT, "--operator", "words.txt", "--method", "mean"],
    ["steer", PROMPT, "--operator", "words.txt", "--rank", "2"],
    called("steer", "--method", "mean", "--rank", "2"),
    called("steer", "--method", "random", "--normed"),
    called("steer", "--method", "suffix", "--toward", "w9"),
    called("steer", "--temperature", "0.7"),
    called("steer", "--layer", "1", "--strength", "0.5", "--max-kl", "1"),
    ["coverage", "--family", "llama", "--fresh"],
    ["faithfulness", "--fresh"],
    # figures
    ["figure"],
    ["figure", "7", PROMPT, "-o", "out.pdf"],
    ["figure", "", PROMPT, "-o", "out.pdf"],
    ["figure", "6", PROMPT],
    ["figure", "6", "-o", "out.pdf"],
    ["figure", "6", "", "-o", "out.pdf"],
    ["figure", "6", PROMPT, "-o", "out.tex"],
    ["figure", "table1", PROMPT, "-o", "out.pdf"],
    ["figure", "6", PROMPT, "-o", "absent/out.pdf"],
    *(["figure", "6", PROMPT, "-o", "out.pdf", "--width", value] for value in ("0", "nan", "0.5", "1000", "wide")),
    ["figure", "6", PROMPT, "-o", "out.pdf", "--style", "absent.mplstyle"],
    ["figure", "6", PROMPT, "-o", "out.pdf", "--lines", "2"],
    ["figure", "6", PROMPT, "-o", "out.pdf", "--layers", "1"],
    ["figure", "6", PROMPT, "-o", "out.pdf", "--model", "a", "--model", "b"],
    ["figure", "table1", PROMPT, "-o", "out.md", "--width", "3"],
    ["figure", "table1", PROMPT, "-o", "out.md", "--layers", "2-1"],
    ["figure", "table1", PROMPT, "-o", "out.md", *(f"--highlight=w{i}" for i in range(7))],
    ["figure", "2", "--saved", "words.txt", "-o", "out.pdf"],
    ["figure", "3", "--saved", "words.txt", "-o", "out.pdf"],
    ["figure", "3", PROMPT, "--saved", "words.txt", "-o", "out.pdf"],
]
AFTER: list[list[object]] = [
    called("explain", "--k", "25"),
    called("explain", "--k", str(10**30)),
    called("explain", "--position", "3"),
    called("layers", "--position", "-4"),
    called("explain", "--memory", "10"),
    ["explain", "w3 " * 65],
    called("explain", "--generate", "1000"),
    called("attribute", "--target", "absent"),
    called("attribute", "--target-id", "61"),
    called("attribute", "--target-id", str(10**30)),
    called("attribute", "--neuron", "L9N1"),
    called("watch", "--top", "100000"),
    called("watch", "--layer", "9"),
    called("steer", "--words", "absent"),
    called("steer", "--words", "w9", "--layer", "9"),
    called("steer", "--words", "w9", "--chat"),
    called("steer", "--words", "w9", "--tokens", "1000"),
    called("steer", "--words", "w9", "--tokens", str(10**20)),
    called("steer", "--words", "w9", "--layer", "1", "--rank", "25"),
    called("steer", "--words", "w9", "--layer", "1", "--strength", "1e38"),
    called("explain", "--dtype", "float8"),
    called("explain", "--device", "cuda:7"),
    called("explain", "--device", "nowhere"),
    called("explain", "--revision", "main"),
    ["figure", "table1", PROMPT, "-o", "out.md", "--layers", "2-9"],
    ["figure", "4b", PROMPT, "-o", "out.pdf", "--lines", "25"],
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with everything that a bad command line may name."""
    (tmp_path / "words.txt").write_text("w3\nw4\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(NOISE)
    (tmp_path / "real.json").write_text("mine")
    (tmp_path / "link.json").symlink_to("real.json")
    os.link(tmp_path / "real.json", tmp_path / "hard.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("absent/out.json")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "facts.safetensors.json").mkdir()
    (tmp_path / "facts.safetensors").write_bytes(b"kept")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def held(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder, with what is in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys, arguments: list[object]) -> str:
    """Run a command line in this process; gives the one line that it must answer with."""
    before = held(Path.cwd())
    with pytest.raises(SystemExit) as stopped:
        app([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, (arguments, out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert held(Path.cwd()) == before
    return err


@pytest.fixture
def no_model(monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("loclin.models.load", load)


def test_there_are_at_least_a_hundred():
    assert len(BEFORE) + len(AFTER) >= 100
    assert len({tuple(map(str, line)) for line in BEFORE + AFTER}) == len(BEFORE) + len(AFTER)


@pytest.mark.sampled(40)
@pytest.mark.parametrize("arguments", BEFORE, ids=lambda line: ascii(" ".join(map(str, line)))[:60])
@pytest.mark.usefixtures("place", "no_model")
def test_a_mistake_that_can_be_seen_is_refused_before_a_model_is_loaded(capsys, arguments):
    refused(capsys, arguments)


@pytest.mark.parametrize("arguments", AFTER, ids=lambda line: ascii(" ".join(map(str, line)))[:60])
@pytest.mark.usefixtures("place")
def test_a_mistake_that_the_model_shows_is_one_line(capsys, directory, arguments):
    refused(capsys, [*arguments, "--model", directory])


@pytest.mark.parametrize("name", ["smollm2-135", "absent/", "./absent", "words.txt", "empty", "~/absent/model"])
def test_a_model_that_there_is_not(place, capsys, name):
    (place / "empty").mkdir()
    refused(capsys, ["explain", PROMPT, "--model", name])


@pytest.mark.parametrize("command", PROMPTED)
@pytest.mark.parametrize(
    ("data", "said"),
    [(NOISE, "is not text"), (b"", "is empty"), (b"a\0b", "NUL"), (b"\xe9", "byte 1 of 1 is not UTF-8")],
)
@pytest.mark.usefixtures("place", "no_model")
def test_standard_input_that_is_no_text(capsys, monkeypatch, command, data, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert said in refused(capsys, [command, "-", *NEEDS.get(command, [])])


@pytest.mark.usefixtures("place")
def test_a_usage_error_names_the_help_that_tells(capsys):
    assert "loclin explain --help" in refused(capsys, ["explain"])
    assert "loclin --help" in refused(capsys, ["explian"])
    assert "Did you mean 'explain'" in refused(capsys, ["explian"])


def test_every_option_is_checked():
    """A number has a range, a text and a path have a check: an option that is added later must have one too."""
    # negative ones count from the end; what is beyond, the model shows
    unranged = {"position", "layer", "token", "at", "query", "key"}
    seen = 0
    for command in [*app.registered_commands, *models.app.registered_commands]:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if name == "return":
                continue
            kind, option = get_args(hint)
            kinds = {kind, *get_args(kind), *(part for inner in get_args(kind) for part in get_args(inner))}
            if int in kinds:
                assert option.min is not None or name in unranged, (command.callback, name)
            elif not kinds.isdisjoint({str, float, Path}):
                assert option.callback is not None, (command.callback, name)
            seen += 1
    assert seen > 100


def process(*arguments: str | bytes, stdin: bytes = b"", **environment: str):
    if environment.get("LC_ALL") == "C" and not loclin.__file__.isascii():
        pytest.skip("Python itself does not start from such a folder in the C locale")
    return subprocess.run(
        [sys.executable, "-m", "loclin", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["explain", "-"], NOISE),
        (["explain", b"caf\xe9"], b""),
        (["explain", "--nope"], b""),
        (["explain", "w3", "--json", "same", "--html", "same"], b""),
        (["attribute", "w3", "--target", b"\xff\xfe"], b""),
    ],
)
@pytest.mark.parametrize(
    "environment",
    [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, {"PYTHONIOENCODING": "cp1252"}],
    ids=["usual", "C", "cp1252"],
)
def test_processes(place, arguments, stdin, environment):
    before = held(place)
    found = process(*arguments, stdin=stdin, **environment)
    assert found.returncode == 2, found
    assert found.stdout == b""
    assert found.stderr.count(b"\n") == 1, found.stderr
    assert found.stderr.startswith(b"error: ")
    assert held(place) == before
