"""Results to files: refused before the work where they cannot be written, and never left half-written."""

from __future__ import annotations

import os
from pathlib import Path

from loclin.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before any work is done for it.

    Raises
    ------
    OutputError
        When the directory is missing or not writable, or the path is a directory or a protected file.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a directory; name a file in it")
    if not folder.exists():
        raise OutputError(f"cannot write {target}: there is no directory {folder}; make it first")
    if not folder.is_dir():
        raise OutputError(f"cannot write {target}: {folder} is not a directory")
    protected = target if target.exists() else folder
    if not os.access(protected, os.W_OK):
        raise OutputError(f"cannot write {target}: no permission to write to {protected}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as `write_bytes` writes bytes, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: beside its place first, then moved there.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    check_writable(path)
    target = Path(path)
    try:
        if target.exists() and not target.is_file():  # a pipe or a device: nothing may take its place
            target.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(target)), data)  # a link stays a link
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def _replace(target: Path, data: bytes) -> None:
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
