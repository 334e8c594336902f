"""What the system keeps of a checkpoint's files in memory: told to it on Linux; elsewhere it decides alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from loclin.common.free_memory import available

_SHARE = 0.5  # of the free memory, where not all fits: sweeps need the rest


class PageCache:
    """Advice about files of the given `sizes`, which are all read once in every sweep.

    Files that fit into the free memory together stay there. Of others the first part stays that fits, and what is
    behind it goes after its use: whatever stays is read faster in every sweep, in either direction, while a cache that
    is left alone drops what was used longest ago, which a sweep in the same direction needs next.
    """

    def __init__(self, sizes: Mapping[Path, int]) -> None:
        room = available(torch.device("cpu"))
        self._kept = dict(sizes)  # how many bytes from a file's beginning on may stay
        if sum(sizes.values()) > room:
            room = int(_SHARE * room)
            for path, size in sizes.items():
                self._kept[path] = min(size, room)
                room -= self._kept[path]

    def announce(self, file: int, start: int, size: int) -> None:
        """Let the system fetch a part of an open file while others are copied."""
        _advise(file, start, size, "POSIX_FADV_WILLNEED")

    def release(self, file: int, path: Path, start: int, size: int) -> None:
        """Let go of a part that was read, as far as it does not fit."""
        end, start = start + size, max(start, self._kept[path])
        if start < end:
            _advise(file, start, end - start, "POSIX_FADV_DONTNEED")


def _advise(file: int, start: int, size: int, advice: str) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # some file systems take no advice, and are read without
            os.posix_fadvise(file, start, size, getattr(os, advice))
