"""Converted copies of GGUF models: made once, completely or not at all, and checked whenever they are used."""

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
    """One converted copy; of one that this user may not read, only the key is known."""

    key: str  # the start of its source's SHA-256; its directory's name
    name: str
    path: Path
    size: int = 0  # bytes on disk
    date: datetime | None = None  # None where its manifest cannot be read
    source: str = "unknown"
    intact: bool = False  # its files are as they were written
    readable: bool = True


def directory() -> Path:
    """The cache directory: $LOCLIN_CACHE, else $XDG_CACHE_HOME/loclin, else ~/.cache/loclin."""
    own, shared = os.environ.get("LOCLIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "loclin"
    except RuntimeError as fault:
        raise ModelError(
            f"there is no place for the model cache ({str(fault).rstrip('.')}); set LOCLIN_CACHE to a directory that "
            "you can write"
        ) from fault


def _models() -> Path:
    return directory() / "models"


def place(source: GgufSource) -> Path:
    """The directory of a source's converted copy, which may not exist yet."""
    return _models() / source.sha256[:KEY_LENGTH]


def entries(*, content: bool = False) -> list[CacheEntry]:
    """List the converted copies by name; `intact` compares sizes, and with `content` hashes, at one read of all."""
    try:
        found = sorted(path for path in _models().iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError as fault:
        raise ModelError(
            f"cannot read the model cache {directory()}: {access.reason(fault, _models())}; set LOCLIN_CACHE to a "
            "directory that you can read"
        ) from fault
    except OSError:
        return []
    return sorted((_entry(path, content) for path in found), key=lambda entry: (entry.name, entry.key))


def _entry(path: Path, content: bool) -> CacheEntry:
    key = path.name
    try:
        record = manifest.read(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if record is None:
            return CacheEntry(key, key, path, size)
        intact = not record.faults(path, content=content)
        return CacheEntry(key, record.name, path, size, datetime.fromisoformat(record.created), record.source, intact)
    except PermissionError:
        return CacheEntry(key, key, path, readable=False)


def remove(name_or_key: str) -> list[CacheEntry]:
    """Remove the copies with this name or key, and say which they were."""
    doomed = [entry for entry in entries() if name_or_key in (entry.name, entry.key)]
    if not doomed:
        there = ", ".join(entry.name for entry in entries()) or "none (the cache is empty)"
        raise ModelError(f"there is no converted copy of {name_or_key!r}: choose from {there}")
    with _lock():
        for entry in doomed:
            with _explain_write_errors(entry.path):
                shutil.rmtree(entry.path)
    return doomed


def obtain(source: GgufSource) -> Path:
    """The directory of a source's converted copy; it is converted if there is none with the right sizes.

    The content is not hashed here: `manifest.Manifest.faults` does that, in parallel with loading.
    """
    target = place(source)
    with readable(target, source.name):
        whole = _whole(target)
    return target if whole else rebuild(source, only_if_broken=True)


def rebuild(source: GgufSource, *, only_if_broken: bool = False) -> Path:
    """Convert a source, and move the copy to its place at once: other processes see a complete copy or none.

    Two processes take turns; with `only_if_broken`, the second finds the first one's copy and uses it.
    """
    target = place(source)
    with _lock(), _explain_write_errors():
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
        needed, free = 4 * header.n_elements, shutil.disk_usage(_models()).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        convert(gguf, header, source.name, fresh, say)
        manifest.write(fresh, source.name, source.file_name, source.sha256, header.stored_dtype)
        access.share(fresh)
        sync(fresh)
    return fresh


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the cache's lock: one conversion at a time, since each takes gigabytes."""
    with _explain_write_errors():
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
    """Turn a permission error in reading a copy into a line that names its owner: the copy is not damaged."""
    try:
        yield
    except PermissionError as fault:
        raise ModelError(
            f"cannot read the converted copy of {name}: {access.reason(fault, copy)}; "
            f"let its owner chmod -R a+rX {copy}, or set LOCLIN_CACHE to a directory of your own"
        ) from fault


@contextmanager
def _explain_write_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an error of writing to the cache, or to one path in it, into a line that says what to do."""
    try:
        yield
    except Exception as fault:
        if isinstance(fault, OSError):
            reason = access.reason(fault, path or directory())
        elif type(fault).__name__ == "SafetensorError" and "I/O error" in str(fault):  # its own, for a full disk
            reason = str(fault)
        else:
            raise
        raise ModelError(
            f"cannot write the model cache {directory()}: {reason}; set LOCLIN_CACHE to a directory with space that "
            "you can write"
        ) from fault
