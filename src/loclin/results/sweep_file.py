"""The state of a long backward sweep in a file, so that a process that was killed in it goes on from there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from loclin.common.access import reason
from loclin.results.provenance import versions

SECONDS = 30.0
"""How much work a kill may cost; shorter sweeps write nothing."""


class SweepFile:
    """The cotangents inside one sweep, in the file `path`; no other process may use it meanwhile.

    The `key`, of JSON values, identifies the sweep, together with the versions of the libraries. A file of another
    sweep, or a damaged one, counts as none. Where it cannot be written, or would leave less than `reserve` bytes on the
    disk, a warning says so, and the sweep goes on without.
    """

    def __init__(self, path: Path, key: dict[str, Any], reserve: int) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._key = json.loads(json.dumps(key | {"versions": versions()}))
        self._reserve, self._works, self._since = reserve, True, time.monotonic()

    def read(self, block: Float[Tensor, "n T d"]) -> tuple[int, slice] | None:
        """Fill the block, laid out as `[T, n, d]`; returns how many steps are done and which positions are active.

        None, and the block holds anything, where no state is kept. Memory: none beside the block, on a CPU.
        """
        rows = block.transpose(0, 1)
        plain = rows.cpu()
        data = _bytes_of(plain)
        try:
            with self._path.open("rb") as file:
                state = json.loads(file.readline())
                whole = file.readinto(data.data) == len(data) and not file.read(1)
            if not whole or state["key"] != self._key or state["digest"] != _digest(data, state["done"]):
                return None
            (done, start, stop) = state["done"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
            return None
        rows.copy_(plain)
        return done, slice(start, stop)

    def note(self, done: int, active: slice, block: Float[Tensor, "n T d"]) -> None:
        """Keep the state after some steps, if enough time has passed since the last. Memory: as for `read`."""
        if not self._works or time.monotonic() - self._since < SECONDS:
            return
        data, where = _bytes_of(block.transpose(0, 1).cpu()), [done, active.start, active.stop]
        try:
            if shutil.disk_usage(self._path.parent).free < len(data) + self._reserve:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            state = {"key": self._key, "done": where, "digest": _digest(data, where)}
            with self._partial.open("wb") as file:
                file.write(f"{json.dumps(state)}\n".encode())
                file.write(data.data)
            self._partial.replace(self._path)
        except OSError as error:
            self._works = False
            self.remove()
            warnings.warn(
                f"The state of this sweep is not kept in {self._path} ({reason(error, self._path)}): if it is "
                "interrupted, these rows are computed again.",
                stacklevel=2,
            )
        self._since = time.monotonic()

    def remove(self) -> None:
        """Remove the file, when the rows of the sweep are on the disk."""
        for path in (self._path, self._partial):
            path.unlink(missing_ok=True)


def _bytes_of(rows: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    assert rows.is_contiguous()
    return rows.view(-1).view(torch.uint8).numpy()


def _digest(data: NDArray[np.uint8], done: list[int]) -> str:
    return hashlib.sha256(data.data, usedforsecurity=False).hexdigest() + str(done)
