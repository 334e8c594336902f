"""How much memory a device has free."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from pathlib import Path

import torch

given_free: ContextVar[int | None] = ContextVar("given_free", default=None)
"""Bytes free on another machine, for which something is planned."""


def available(device: torch.device) -> int:
    """Bytes free on a device now; on a CPU, what the system could allocate without swapping."""
    if (given := given_free.get()) is not None:
        return given
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
