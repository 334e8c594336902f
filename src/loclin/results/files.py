"""Results to files: refused before the work where they cannot be written, and never left half-written."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from loclin.common.access import reason, refusal
from loclin.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before any work is done for it.

    It is tried: a file is made beside the place, and taken away again.

    Raises
    ------
    OutputError
        When the directory is missing or not writable, or the path is a directory or a protected file.
    """
    target = Path(path)
    try:
        real = Path(os.path.realpath(target))  # a link is written through
        folder = real.parent
        if real.is_dir():
            raise OutputError(f"cannot write {target}: it is a directory; name a file in it")
        if not folder.exists():
            raise OutputError(f"cannot write {target}: there is no directory {folder}; make it first")
        if not folder.is_dir():
            raise OutputError(f"cannot write {target}: {folder} is not a directory")
        with suppress(FileNotFoundError):
            real.stat()  # a loop of links, or a name that is too long
        for needed in _written(target):
            if not os.access(needed, os.W_OK):
                raise OutputError(f"cannot write {target}: {refusal(needed)}; chmod it or choose another path")
        if not real.exists() or real.is_file():  # what is neither, a pipe or a device, is written in its place
            partial = _partial(real)
            partial.touch()
            partial.unlink()
    except (OSError, ValueError) as error:
        why = reason(error, target) if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write {target}: {why}; choose another path") from error


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


def check_apart(
    outputs: Mapping[str, str | os.PathLike[str]], inputs: Mapping[str, str | os.PathLike[str]] | None = None
) -> None:
    """Refuse two results in one file, and a result in the place of what is read or printed.

    Files are told apart by what they are: links, other spellings and hard links of one file are that file.

    Parameters
    ----------
    outputs
        Paths that will be written, by what a person calls them.
    inputs
        Files, and directories of models, that are read.

    Raises
    ------
    OutputError
        Naming the two.
    """
    written = list(outputs.items())
    for i, (name, path) in enumerate(written):
        for other, second in written[:i]:
            if _same(path, second):
                raise OutputError(f"{other} and {name} are the same file, {path}; name two")
        for other, second in (inputs or {}).items():
            if _same(path, second) or (Path(second).is_dir() and Path(path).exists() and _within(path, second)):
                raise OutputError(f"{name} would write over what {other} reads, {path}; name another file")
        for stream in (1, 2):
            if _is_stream(path, stream):
                raise OutputError(f"{name} would write over what is printed, {path}; name another file")


def _same(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    one, two = (Path(os.path.normcase(os.path.realpath(p))) for p in (path, other))
    if one.exists() and two.exists():
        return one.samefile(two) and (one.is_file() or one.is_dir())  # a device takes many
    return one == two


def _within(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    return Path(os.path.realpath(path)).parent.samefile(folder)


def _is_stream(path: str | os.PathLike[str], stream: int) -> bool:
    """Whether a file is what standard output or error is redirected to."""
    try:
        return Path(path).is_file() and os.path.samestat(Path(path).stat(), os.fstat(stream))
    except OSError:
        return False


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")


def _replace(target: Path, data: bytes) -> None:
    partial = _partial(target)
    try:
        partial.write_bytes(data)
        if target.exists():  # who may read it stays as its owner chose
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        partial.replace(target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
