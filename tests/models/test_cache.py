"""GGUF files and their converted copies: made once, whole or not at all, checked at every use."""

from __future__ import annotations

import json
import os
import pty
import pwd
import shutil
import signal
import time
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loclin.errors import ModelError
from loclin.models import load
from loclin.models.gguf import cache
from loclin.models.gguf import source as gguf_source

from .helpers import start, tiny_gguf


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    """A GGUF file, and a cache that holds its converted copy."""
    home = tmp_path_factory.mktemp("converted")
    path = tiny_gguf(home / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCLIN_CACHE", str(home / "cache"))
        load(path)
    return path, home / "cache"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(home, converted) -> tuple[Path, Path]:
    """A GGUF file and the directory of its converted copy, in a cache of the test's own."""
    shutil.copytree(converted[1], home)
    (entry,) = cache.entries()
    return converted[0], entry.path


@pytest.fixture
def no_conversion(monkeypatch):
    monkeypatch.setattr(cache, "convert", lambda *_: pytest.fail("converted again"))


def partial(home: Path) -> list[Path]:
    return list((home / "models").glob(f"{cache.PARTIAL}*"))


# The copy is the model


def test_the_copy_is_bitwise_what_transformers_reads_from_the_file(filled):
    path, entry = filled
    model = load(path)
    original = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = original.state_dict()
    assert state.keys() == model.hf.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.hf.state_dict().items())
    ids = model.encode("the cat", bos=True)
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, original(ids).logits)
    assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((entry / "config.json").read_text())
    assert not hasattr(model.hf.config, "quantization_config")
    assert getattr(model.hf, "hf_quantizer", None) is None


def test_the_tokenizer_is_the_one_transformers_reads_from_the_file(filled):
    path, entry = filled
    ours = load(path).tokenizer
    for theirs in (
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
        AutoTokenizer.from_pretrained(entry),
    ):
        for text in ("the cat in the hat", " a  b\n", "<s>é✓", "x" * 50):
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.special_tokens_map == theirs.special_tokens_map


def test_info_names_the_file_and_how_it_is_stored(filled):
    path, entry = filled
    info = load(path).info
    assert (info.source, info.stored_dtype, info.dtype) == ("gguf", "Q8_0 gguf", "float32")
    assert info.sha256 is not None
    assert info.sha256.startswith(entry.name)


def test_dtype_auto_is_the_copys(filled):
    assert load(filled[0], dtype="auto").info.dtype == "float32"
    assert load(filled[0], dtype="float64").info.dtype == "float64"


@pytest.mark.usefixtures("no_conversion")
def test_a_copy_is_used_again_whatever_the_file_is_called(filled, tmp_path):
    shutil.copy(filled[0], tmp_path / "renamed.GGUF")
    assert load(tmp_path / "renamed.GGUF").info.stored_dtype == "Q8_0 gguf"


def test_another_file_has_another_copy(filled, tmp_path):
    other = tiny_gguf(tmp_path / "tiny.gguf", seed=1)
    assert not torch.equal(load(other).hf.lm_head.weight, load(filled[0]).hf.lm_head.weight)
    assert len(cache.entries()) == 2


def test_nothing_but_the_copy_is_kept(home, tmp_path):
    load(tiny_gguf(tmp_path / "tiny.gguf"))
    (entry,) = cache.entries()
    assert [path for path in home.rglob("*.gguf")] == []
    assert sorted(path.name for path in (home / "models").iterdir()) == [entry.key]
    assert entry.intact


def test_conversion_prints_nothing_where_there_is_no_terminal(tmp_path, capfd):
    load(tiny_gguf(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")


def test_conversion_says_what_it_does_on_a_terminal(home, tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    ours, theirs = pty.openpty()
    process = start(SLOW.format(seconds=1) + LOAD.format(path=str(path)), home, stderr=theirs)
    out, _ = process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0, shown
    assert "Converting tiny.gguf once" in shown
    assert "it/s" not in shown  # the libraries' bars stay away
    assert "Converting tiny.gguf" not in out


# Two at once, and interruptions

LOAD = "from loclin.models import load; print(load({path!r}).hf.lm_head.weight.double().sum().item())"
SLOW = """
import time
from loclin.models.gguf import cache
convert = cache.convert
def slow(*arguments):
    print("converting", flush=True)
    time.sleep({seconds})
    convert(*arguments)
cache.convert = slow
"""


def test_two_processes_at_once_convert_once_and_agree(home, tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    code = "import logging; logging.basicConfig(level=logging.INFO)\n" + SLOW.format(seconds=4)
    both = [start(code + LOAD.format(path=str(path)), home) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    outputs = "".join(out for out, _ in results).split("\n")
    assert outputs.count("converting") == 1
    sums = [line for line in outputs if line and line != "converting"]
    assert len(sums) == 2
    assert sums[0] == sums[1]
    assert any("Waiting for another process" in err for _, err in results)
    assert len(cache.entries()) == 1
    assert partial(home) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_copy_and_the_next_one_works(home, tmp_path, how):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    process = start(SLOW.format(seconds=600) + LOAD.format(path=str(path)), home)
    assert process.stdout is not None
    assert process.stdout.readline() == "converting\n"
    assert len(partial(home)) == 1
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert cache.entries() == []
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert partial(home) == []
    load(path)
    assert partial(home) == []  # what a killed process left is gone too
    assert [entry.intact for entry in cache.entries()] == [True]


def test_a_failure_while_writing_leaves_no_copy(home, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(cache.manifest, "write", fail)
    with pytest.raises(RuntimeError, match="boom"):
        load(tiny_gguf(tmp_path / "tiny.gguf"))
    assert list((home / "models").iterdir()) == []


# Altered copies


def flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (entry / "model.safetensors").write_bytes(data)


def cut_off(entry: Path) -> None:
    data = (entry / "model.safetensors").read_bytes()
    (entry / "model.safetensors").write_bytes(data[:-7])


def garble_the_tokenizer(entry: Path) -> None:
    size = (entry / "tokenizer.json").stat().st_size
    (entry / "tokenizer.json").write_bytes(b"?" * size)


def change_the_config(entry: Path) -> None:
    text = (entry / "config.json").read_text()
    assert '"rms_norm_eps": 1e-05' in text or '"rms_norm_eps": 9' in text
    (entry / "config.json").write_text(text.replace('"rms_norm_eps": ', '"rms_norm_ep5": '))


@pytest.mark.parametrize("alter", [flip_a_byte, garble_the_tokenizer, change_the_config])
def test_an_altered_copy_is_noticed_and_made_again_with_one_warning(filled, alter):
    path, entry = filled
    before = {file.name: file.read_bytes() for file in entry.iterdir() if file.name != "manifest.json"}
    alter(entry)
    with pytest.warns(UserWarning, match=r"copy of tiny\.gguf was altered") as caught:
        model = load(path)
    assert len(caught) == 1
    after = {file.name: file.read_bytes() for file in entry.iterdir() if file.name != "manifest.json"}
    assert after == before
    assert torch.equal(model.hf.lm_head.weight, load(path).hf.lm_head.weight)


def delete_weights(entry: Path) -> None:
    (entry / "model.safetensors").unlink()


def add_a_file(entry: Path) -> None:
    (entry / "adapter_config.json").write_text("{}")


def garble_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("{")


def empty_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("{}")


def delete_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    "alter",
    [cut_off, delete_weights, add_a_file, garble_the_manifest, empty_the_manifest, delete_the_manifest],
)
def test_a_copy_that_is_not_whole_is_made_again(filled, alter):
    path, entry = filled
    alter(entry)
    assert [each.intact for each in cache.entries()] == [False]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        load(path)
    assert [each.intact for each in cache.entries(content=True)] == [True]


def test_a_copy_that_never_stays_as_written_is_an_error_and_not_a_loop(filled, monkeypatch):
    altered = ["model.safetensors"]
    monkeypatch.setattr(cache.manifest.Manifest, "faults", lambda *_, content=True, **_block: altered * content)
    with (
        pytest.warns(UserWarning, match="altered"),
        pytest.raises(ModelError, match="changes after it is written"),
    ):
        load(filled[0])


# The cache's place


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCLIN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/loclin"),
        ({"HOME": "/c"}, "/c/.cache/loclin"),
    ],
)
def test_the_environment_chooses_the_place(monkeypatch, variables, expected):
    for name in ("LOCLIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("LOCLIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_uid: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ModelError, match="no place for the model cache .*set LOCLIN_CACHE"):
        cache.entries()
    with pytest.raises(ModelError, match="there is no directory ~nobody_of_this_name/model"):
        load("~nobody_of_this_name/model")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "file" / "cache"))
    assert cache.entries() == []
    with pytest.raises(ModelError, match=r"cannot write the model cache .*LOCLIN_CACHE"):
        load(tiny_gguf(tmp_path / "tiny.gguf"))


@pytest.mark.usefixtures("no_conversion")
def test_too_little_space_is_said_before_the_work(home, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(ModelError, match=r"cannot write the model cache .* GB needed, .*LOCLIN_CACHE"):
        load(tiny_gguf(tmp_path / "tiny.gguf"))
    assert partial(home) == []


def test_a_disk_that_fills_up_is_one_line(home, tmp_path):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    process = start(limit + LOAD.format(path=str(path)), home)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("loclin.errors.ModelError: cannot write the model cache")
    assert "LOCLIN_CACHE" in last
    assert partial(home) == []


# Listing and removing


def test_entries_say_what_is_there(filled):
    path, place = filled
    (entry,) = cache.entries()
    assert entry.name == entry.source == "tiny.gguf"
    assert entry.path == place
    assert entry.size == sum(file.stat().st_size for file in place.iterdir())
    assert entry.date is not None
    assert abs(entry.date.timestamp() - time.time()) < 3600
    assert entry.intact


def test_only_a_full_look_sees_a_changed_byte(filled):
    flip_a_byte(filled[1])
    assert [entry.intact for entry in cache.entries()] == [True]
    assert [entry.intact for entry in cache.entries(content=True)] == [False]


@pytest.mark.parametrize("by", ["name", "key"])
def test_remove_takes_a_name_or_a_key(filled, by):
    (entry,) = cache.entries()
    assert cache.remove(getattr(entry, by)) == [entry]
    assert cache.entries() == []
    assert not filled[1].exists()


@pytest.mark.usefixtures("filled")
def test_removing_what_is_not_there_lists_what_is():
    with pytest.raises(ModelError, match=r"'nope': choose from tiny\.gguf"):
        cache.remove("nope")


@pytest.mark.usefixtures("no_conversion")
def test_a_file_that_changes_under_the_reader_is_refused(tmp_path):
    source = gguf_source.gguf_file(tiny_gguf(tmp_path / "tiny.gguf"))
    tiny_gguf(tmp_path / "tiny.gguf", seed=1)
    with pytest.raises(ModelError, match=r"tiny\.gguf has other content than expected: .*it changed"):
        cache.obtain(source)
