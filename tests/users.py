"""What surrounds a run: another user, another umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY = 65534


@contextmanager
def stranger() -> Iterator[None]:
    """Be a user who owns nothing, where this one may; else this one, who is not root and so is refused like any other.

    The real user changes too, for that is the one `os.access` asks about; the saved one stays, to come back.
    """
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Files are made with this umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
