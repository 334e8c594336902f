"""Whose a file is: what to say when this user may not use it, and how to leave one that others may."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def reason(fault: OSError, path: Path) -> str:
    """Say why the system refused: for want of a permission, which file it is that refuses, and whose.

    Parameters
    ----------
    fault
        What the system said.
    path
        What was asked for; the fault's own file name, where it is a whole one, is preferred.
    """
    if not isinstance(fault, PermissionError):
        return fault.strerror or str(fault)
    named = Path(os.fsdecode(fault.filename)) if isinstance(fault.filename, str | bytes) else path
    return refusal(named if named.is_absolute() else path)


def refusal(path: Path) -> str:
    """Name the path that refuses access to `path`: itself, or the nearest folder above it that can be seen."""
    for here in (path, *path.absolute().parents):
        try:
            found = here.stat()
        except OSError:
            continue
        return (
            f"permission denied: {here}, owned by {_owner(here, found.st_uid)} (mode {stat.S_IMODE(found.st_mode):04o})"
        )
    return f"permission denied: {path}"


def _owner(path: Path, uid: int) -> str:
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):  # a user of another machine; a system without owners
        return f"user {uid}"


def share(directory: Path) -> None:
    """Let everyone read, and write, a directory's files who may do so with the directory.

    A directory has what the umask leaves; some libraries write files that their owner alone may read.
    """
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(mode)
