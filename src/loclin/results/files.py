"""Writing files: checked before the computation starts, and never left half-written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from loclin.common.access import reason, refusal
from loclin.errors import OutputError, ResultError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, before the computation starts: creates a file beside it, and removes it.

    Raises OutputError when the directory is missing or not writable, or the path is a directory or a protected file.
    """
    target = Path(path)
    try:
        real = Path(os.path.realpath(target))  # writing through a link keeps the link
        folder = real.parent
        if real.is_dir():
            raise OutputError(f"cannot write {target}: it is a directory; name a file in it")
        if not folder.exists():
            raise OutputError(f"cannot write {target}: there is no directory {folder}; make it first")
        if not folder.is_dir():
            raise OutputError(f"cannot write {target}: {folder} is not a directory; choose another path")
        with suppress(FileNotFoundError):
            real.stat()  # raises for a loop of links, or a name that is too long
        plain = not target.exists() or target.is_file()  # others are written in place: no file is created or replaced
        for needed in [folder, *([real] if real.exists() else [])] if plain else [target]:
            if not os.access(needed, os.W_OK):
                raise OutputError(f"cannot write {target}: {refusal(needed)}; chmod it or choose another path")
        if not real.exists() or real.is_file():  # pipes and devices are written directly
            partial = _partial_path(real)
            partial.touch()
            partial.unlink()
    except (OSError, ValueError) as error:
        why = reason(error, target) if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write {target}: {why}; choose another path") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8; raises ResultError when it is missing, not readable, or not text."""
    try:
        with readable(path):
            return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ResultError(f"cannot read {path}: it is not text; name a file that save() made") from error


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise ResultError where a file that is read inside is missing or not readable."""
    try:
        yield
    except FileNotFoundError as error:
        raise ResultError(f"cannot read {path}: there is no such file; check its name") from error
    except OSError as error:
        raise ResultError(f"cannot read {path}: {reason(error, Path(path))}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file completely (a temporary file beside it is renamed) or not at all, and raise OutputError."""
    check_writable(path)
    target = Path(path)
    try:
        if target.exists() and not target.is_file():  # a pipe or a device must not be replaced
            target.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(target)), data)  # a link stays a link
    except OSError as error:
        raise OutputError(f"cannot write {target}: {reason(error, target)}") from error


def check_apart(
    outputs: Mapping[str, str | os.PathLike[str]], inputs: Mapping[str, str | os.PathLike[str]] | None = None
) -> None:
    """Refuse two outputs in one file, and an output that would overwrite an input or the printed output.

    Both are by the names of options; inputs are files and model directories. Links, hard links and other spellings of a
    path count as the same file. Raises OutputError, which names both.
    """
    written = list(outputs.items())
    for i, (name, path) in enumerate(written):
        for other, second in written[:i]:
            if _is_same(path, second):
                raise OutputError(f"{other} and {name} are the same file, {path}; name two")
        for other, second in (inputs or {}).items():
            folder = Path(os.path.realpath(path)).parent
            if _is_same(path, second) or (Path(second).is_dir() and Path(path).exists() and folder.samefile(second)):
                raise OutputError(f"{name} would overwrite what {other} reads, {path}; name another file")
        for stream in (1, 2):
            if _is_stream(path, stream):
                raise OutputError(f"{name} would overwrite what is printed, {path}; name another file")


def _is_same(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    one, two = (Path(os.path.normcase(os.path.realpath(p))) for p in (path, other))
    if one.exists() and two.exists():
        return one.samefile(two) and (one.is_file() or one.is_dir())  # a device can take several outputs
    return one == two


def _is_stream(path: str | os.PathLike[str], stream: int) -> bool:
    """Tell whether standard output or error is redirected to this file."""
    try:
        return Path(path).is_file() and os.path.samestat(Path(path).stat(), os.fstat(stream))
    except OSError:
        return False


def _partial_path(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")


def _replace(target: Path, data: bytes) -> None:
    partial = _partial_path(target)
    try:
        partial.write_bytes(data)
        if target.exists():  # keep the permissions of the file
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        partial.replace(target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
