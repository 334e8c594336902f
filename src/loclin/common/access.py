"""File permissions: messages that name a file's owner, and files that others can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def reason(fault: OSError, path: Path) -> str:
    """Explain an operating system error; for a missing permission, with the file that refuses and its owner.

    `path` is what was used; the error's own file name is preferred, if it is absolute.
    """
    if not isinstance(fault, PermissionError):
        return fault.strerror or str(fault)
    named = Path(os.fsdecode(fault.filename)) if isinstance(fault.filename, str | bytes) else path
    return refusal(named if named.is_absolute() else path)


def refusal(path: Path) -> str:
    """Name the path that refuses access to `path`: itself, or the nearest parent that exists and can be read."""
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
    except (KeyError, OSError, NotImplementedError):  # a user of another machine, or a system without owners
        return f"user {uid}"


def share(directory: Path) -> None:
    """Give a directory's files its own permissions, those of the umask: some libraries write for their owner alone."""
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.iterdir():
        if path.is_file():
            path.chmod(mode)
