"""Converted copies of GGUF models: made once, whole or not at all, and checked whenever they are used."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from loclin.common import access
from loclin.errors import ModelError
from loclin.models.gguf import manifest
from loclin.models.gguf.header import read_header
from loclin.models.gguf.source import GgufSource, convert, sync
from loclin.models.quiet import quiet, status

PARTIAL = ".partial-"
KEY_LENGTH = 16


@dataclass(frozen=True)
class CacheEntry:
    """One converted copy.

    Attributes
    ----------
    key
        The start of its source's SHA-256; its directory's name.
    name
        What it was loaded as.
    path
        Its directory.
    size
        Its bytes on disk.
    date
        When it was converted; None where its manifest cannot be read.
    source
        The GGUF file it came from.
    intact
        Whether its files are as they were written.
    readable
        Whether this user may read it; where not, nothing else is known of it.
    """

    key: str
    name: str
    path: Path
    size: int
    date: datetime | None
    source: str
    intact: bool
    readable: bool = True


def directory() -> Path:
    """Give the cache directory: $LOCLIN_CACHE, else $XDG_CACHE_HOME/loclin, else ~/.cache/loclin.

    Raises
    ------
    ModelError
        When none is named, and this user has no home.
    """
    own, shared = os.environ.get("LOCLIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "loclin"
    except RuntimeError as fault:
        raise ModelError(
            f"There is no place for the model cache: {fault} Set LOCLIN_CACHE to a directory that you can write."
        ) from fault


def _models() -> Path:
    return directory() / "models"


def place(source: GgufSource) -> Path:
    """Give the directory that a source's converted copy has, or will have."""
    return _models() / source.sha256[:KEY_LENGTH]


def entries(*, content: bool = False) -> list[CacheEntry]:
    """List the converted copies, oldest name first.

    Parameters
    ----------
    content
        Also hash every file. Cost: one read of all of them; without it, sizes only.

    Raises
    ------
    ModelError
        When the cache may not be looked into.
    """
    try:
        found = sorted(path for path in _models().iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError as fault:
        raise ModelError(
            f"Cannot read the model cache {directory()}: {access.reason(fault, _models())}. "
            "Set LOCLIN_CACHE to a directory that you can read."
        ) from fault
    except OSError:
        return []
    return sorted((_entry(path, content) for path in found), key=lambda entry: (entry.name, entry.key))


def _entry(path: Path, content: bool) -> CacheEntry:
    try:
        return _described(path, content)
    except PermissionError:
        return CacheEntry(path.name, path.name, path, 0, None, "unknown", intact=False, readable=False)


def _described(path: Path, content: bool) -> CacheEntry:
    record = manifest.read(path)
    return CacheEntry(
        key=path.name,
        name=record.name if record else path.name,
        path=path,
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        date=datetime.fromisoformat(record.created) if record else None,
        source=record.source if record else "unknown",
        intact=record is not None and not record.faults(path, content=content),
    )


def remove(name_or_key: str) -> list[CacheEntry]:
    """Remove the copies with this name or key, and say which they were.

    Raises
    ------
    ModelError
        When there is none, or it cannot be removed.
    """
    doomed = [entry for entry in entries() if name_or_key in (entry.name, entry.key)]
    if not doomed:
        there = ", ".join(entry.name for entry in entries()) or "none"
        raise ModelError(f"There is no converted copy of {name_or_key!r}; there are: {there}.")
    with _lock():
        for entry in doomed:
            with _explain(entry.path):
                shutil.rmtree(entry.path)
    return doomed


def obtain(source: GgufSource) -> Path:
    """Give a source's converted copy, converting it if there is none of the right sizes.

    The content is not hashed here: `manifest.Manifest.faults` does that, beside the loading.

    Raises
    ------
    ModelError
        When the source is missing, not what it should be or unreadable, or the cache cannot be written, or read.
    """
    target = place(source)
    with readable(target, source.name):
        whole = _whole(target)
    return target if whole else rebuild(source, only_if_broken=True)


def rebuild(source: GgufSource, *, only_if_broken: bool = False) -> Path:
    """Convert a source and put the copy in its place at once: whoever looks sees a whole copy or none.

    Two processes take turns; with `only_if_broken`, the second finds the first one's copy and uses it.

    Raises
    ------
    ModelError
        As for `obtain`.
    """
    target = place(source)
    with _lock(), _explain():
        if only_if_broken and _whole(target):
            return target
        for left in _models().glob(f"{PARTIAL}*"):  # from a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=_models(), ignore_cleanup_errors=True) as scratch:
            fresh = _convert(source, Path(scratch))
            if target.exists():  # a directory that is not empty cannot be replaced
                target.rename(Path(scratch) / "old")
            fresh.rename(target)
            sync(_models())
    return target


def _whole(path: Path) -> bool:
    record = manifest.read(path)
    return record is not None and not record.faults(path, content=False)


def _convert(source: GgufSource, scratch: Path) -> Path:
    fresh = scratch / "copy"
    fresh.mkdir()
    with status(f"Converting {source.name} once: checking its file …") as say, quiet():
        gguf = source.place(scratch)
        header = read_header(gguf)
        _insist_on_space(4 * header.n_elements)
        convert(gguf, header, source.name, fresh, say)
        manifest.write(
            fresh,
            name=source.name,
            source=source.file_name,
            source_sha256=source.sha256,
            stored_dtype=header.stored_dtype,
        )
        access.share(fresh)
        sync(fresh)
    return fresh


def _insist_on_space(needed: int) -> None:
    free = shutil.disk_usage(_models()).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the cache's lock: one conversion at a time, since each takes gigabytes."""
    with _explain():
        _models().mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory() / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with status("Waiting for another process that is converting a model …"):
                lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def readable(copy: Path, name: str) -> Iterator[None]:
    """Say whose a copy is that this user may not read: it is not a damaged one."""
    try:
        yield
    except PermissionError as fault:
        raise ModelError(
            f"Cannot read the converted copy of {name}: {access.reason(fault, copy)}; "
            f"let its owner chmod -R a+rX {copy}, or set LOCLIN_CACHE to a directory of your own."
        ) from fault


@contextmanager
def _explain(path: Path | None = None) -> Iterator[None]:
    """Turn a disk's complaint, about a path in the cache or all of it, into what the user can do about it."""
    try:
        yield
    except OSError as fault:
        raise ModelError(
            f"Cannot write the model cache {directory()}: {access.reason(fault, path or directory())}. "
            "Set LOCLIN_CACHE to a directory with space that you can write."
        ) from fault
    except Exception as fault:  # safetensors has an error of its own for a full disk
        if type(fault).__name__ == "SafetensorError" and "I/O error" in str(fault):
            raise ModelError(
                f"Cannot write the model cache {directory()}: {fault}. "
                "Set LOCLIN_CACHE to a directory with space that you can write."
            ) from fault
        raise
