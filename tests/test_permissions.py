"""Files are for whom the umask lets, and a refusal says which file refuses, and whose it is."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from loclin.analyses.coverage.result import Coverage
from loclin.errors import LoclinError, ModelError, OutputError, ResultError
from loclin.linearization import linearize
from loclin.models import load
from loclin.models.gguf import cache
from loclin.results.dense_file import DenseFile
from loclin.results.files import check_writable, write_text
from loclin.results.result import Record
from loclin.results.tensor_file import load_tensors, save_tensors
from models.helpers import tiny_gguf
from users import stranger, umask

OWNED = r"permission denied: \S*{name}, owned by \w+ \(mode \d{{4}}\)"


@pytest.fixture(autouse=True)
def ordinary() -> Iterator[None]:
    """What most users have: others may read."""
    with umask(0o022):
        yield


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that others may look into; pytest's own are private."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)
        for path in Path(made).rglob("*"):
            if path.is_dir():
                path.chmod(0o700)


@pytest.fixture(scope="module")
def gguf() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        path = tiny_gguf(Path(made) / "tiny.gguf")
        path.chmod(0o644)
        yield path


def modes(folder: Path) -> tuple[set[int], set[int]]:
    """The modes of all folders, and of all files, in a folder."""
    found = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*")]
    return {mode for is_dir, mode in found if is_dir}, {mode for is_dir, mode in found if not is_dir}


def dense(path: Path) -> torch.Tensor:
    return DenseFile(path, (2, 1, 3), torch.float64, {"of": "ones"}).obtain(
        lambda start: iter([(slice(start, 2), torch.ones(2 - start, 1, 3, dtype=torch.float64))])
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_every_file_has_what_the_umask_leaves(place, gguf, mask, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "shared" / "cache"))
    with umask(mask):
        (place / "results").mkdir()
        load(gguf)
        write_text(place / "results" / "page.html", "x")
        save_tensors(place / "results" / "J.safetensors", {"a": torch.ones(2)}, {})
        dense(place / "results" / "J.npy")
        linearize(tiny.llama(), tiny.prompt()).jacobian().svd(1).save(place / "results" / "svd.safetensors")
    folders, files = modes(place)
    assert folders == {0o777 & ~mask}
    assert files == {0o666 & ~mask}


def test_a_file_that_is_written_over_keeps_who_may_read_it(place):
    (place / "page.html").write_text("old")
    (place / "page.html").chmod(0o640)
    write_text(place / "page.html", "new")
    assert stat.S_IMODE((place / "page.html").stat().st_mode) == 0o640


def test_another_user_loads_from_a_cache_that_is_not_theirs(place, gguf, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "cache"))
    with umask(0o022):
        mine = load(gguf).hf.lm_head.weight
    for path in (place / "cache", *(place / "cache").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with stranger():
        assert torch.equal(load(gguf).hf.lm_head.weight, mine)
        assert [entry.intact for entry in cache.entries(content=True)] == [True]


@pytest.mark.parametrize("hidden", ["model.safetensors", "manifest.json", "tokenizer.json", ""])
def test_a_copy_that_may_not_be_read_is_no_damaged_one(place, gguf, monkeypatch, hidden):
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "cache"))
    load(gguf)
    (entry,) = cache.entries()
    private = entry.path / hidden
    private.chmod(0)
    with stranger():
        with pytest.raises(
            ModelError, match=f"cannot read .*tiny.gguf: {OWNED.format(name=private.name)}.*LOCLIN_CACHE"
        ):
            load(gguf)
        (seen,) = cache.entries()
        assert seen.readable == (hidden in ("model.safetensors", "tokenizer.json"))  # sizes are there for all
    private.chmod(0o755)
    assert load(gguf).info.stored_dtype == "Q8_0 gguf"


def test_a_cache_that_may_not_be_looked_into_is_no_empty_one(place, gguf, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "cache"))
    assert cache.entries() == []
    with umask(0o077):
        load(gguf)
    with stranger():
        for look in (cache.entries, lambda: cache.remove("tiny.gguf")):
            with pytest.raises(ModelError, match=f"{OWNED.format(name='cache')}.*LOCLIN_CACHE"):
                look()


@pytest.mark.parametrize("mode", [0o555, 0])
def test_a_cache_that_may_not_be_written_names_its_owner(place, gguf, monkeypatch, mode):
    (place / "cache").mkdir()
    (place / "cache").chmod(mode)
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "cache"))
    with stranger(), pytest.raises(ModelError, match=f"{OWNED.format(name='cache')}.*LOCLIN_CACHE") as caught:
        load(gguf)
    assert "\n" not in str(caught.value)


def test_a_copy_in_a_folder_of_another_is_not_removed(place, gguf, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(place / "cache"))
    load(gguf)
    (entry,) = cache.entries()
    (place / "cache" / "lock").chmod(0o666)
    for path in (place / "cache" / "models", entry.path):
        path.chmod(0o555)
    with stranger(), pytest.raises(ModelError, match=OWNED.format(name=entry.key)):
        cache.remove("tiny.gguf")
    assert [each.intact for each in cache.entries()] == [True]


def test_results_that_may_not_be_read_or_written(place):
    save_tensors(place / "J.safetensors", {"a": torch.ones(2)}, {})
    dense(place / "J.npy")
    (place / "old.json").write_text("{}")
    for path in place.iterdir():
        path.chmod(0)
    place.chmod(0o555)
    reads = {
        "J.safetensors": lambda path: load_tensors(path),
        "J.npy": dense,
        "old.json": lambda path: Record(path, Coverage, fresh=False).read(),
    }
    writes = {"old.json": check_writable, "new.json": check_writable, "J2.npy": dense}
    with stranger():
        for name, read in reads.items():
            with pytest.raises((ResultError, OutputError), match=OWNED.format(name=re.escape(name) + r"(\.json)?")):
                read(place / name)
        for name, write in writes.items():
            with pytest.raises(OutputError, match=OWNED.format(name=place.name)):
                write(place / name)
    place.chmod(0)
    with stranger():
        for use in (*reads.values(), *writes.values()):
            with pytest.raises(LoclinError, match=OWNED.format(name=place.name)) as caught:
                use(place / "any")
            assert "\n" not in str(caught.value)
    place.chmod(0o755)


def test_a_whole_result_is_read_from_a_folder_that_may_not_be_written(place):
    with umask(0o022):
        save_tensors(place / "J.safetensors", {"a": torch.ones(2)}, {})
        whole = dense(place / "J.npy")
    place.chmod(0o555)
    with stranger():
        assert torch.equal(load_tensors(place / "J.safetensors")[0]["a"], torch.ones(2))
        assert torch.equal(dense(place / "J.npy"), whole)


def test_a_model_that_may_not_be_read(place, gguf):
    tiny.llama().save_pretrained(place / "model")
    shutil.copy(gguf, place / "private.gguf")
    (place / "private.gguf").chmod(0)
    for name, hidden in (
        ("private.gguf", "private.gguf"),
        ("model", "model.safetensors"),
        ("model", "config.json"),
        ("model", ""),
    ):
        private = place / "model" / hidden if name == "model" else place / hidden
        before = private.stat().st_mode
        private.chmod(0)
        with stranger(), pytest.raises(ModelError, match="[Pp]ermission denied") as caught:
            load(place / name)
        assert "\n" not in str(caught.value)
        private.chmod(before)
