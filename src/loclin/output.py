"""Results to files: refused before the work where they cannot be written, and never left half-written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loclin.errors import OutputError
from loclin.models.access import reason, refusal


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before any work is done for it.

    Raises
    ------
    OutputError
        When the directory is missing or not writable, or the path is a directory or a protected file.
    """
    target = Path(path)
    folder = target.parent
    try:
        if target.is_dir():
            raise OutputError(f"cannot write {target}: it is a directory; name a file in it")
        if not folder.exists():
            raise OutputError(f"cannot write {target}: there is no directory {folder}; make it first")
        if not folder.is_dir():
            raise OutputError(f"cannot write {target}: {folder} is not a directory")
        for needed in _written(target):
            if not os.access(needed, os.W_OK):
                raise OutputError(f"cannot write {target}: {refusal(needed)}; chmod it or choose another path")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {reason(error, target)}; choose another path") from error


def _written(target: Path) -> list[Path]:
    """What must be writable for a file to be: its folder, where it is made, and what it takes the place of."""
    real = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        return [target]
    return [real.parent, *([real] if real.exists() else [])]


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
        raise OutputError(f"cannot write {target}: {reason(error, target)}") from error


def _replace(target: Path, data: bytes) -> None:
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        if target.exists():  # who may read it stays as its owner chose
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        partial.replace(target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
