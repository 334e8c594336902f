"""A dense map in a temporary file, where memory has no room for it: written by rows, read back by tokens."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from loclin.errors import OutputError


class SpilledMap:
    """J `[d_out, T, d_in]` in a file without a name, which the system deletes when nothing refers to it any more.

    It is read by `preadv`, and not mapped: pages of a mapping would count as this process's memory. OutputError where
    the folder for temporary files has no room.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, rows: Iterable[Tensor]) -> None:
        self._shape, self._dtype = shape, dtype
        nbytes, folder = shape[0] * shape[1] * shape[2] * dtype.itemsize, tempfile.gettempdir()
        if nbytes > (free := shutil.disk_usage(folder).free):
            raise OutputError(f"{_why(nbytes, folder)}, which has {free / 1e9:.2f} GB free; {_FIX}")
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)
        weakref.finalize(self, self._file.close)
        try:
            for part in rows:
                self._file.write(part.contiguous().cpu().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as fault:
            self._file.close()
            raise OutputError(f"{_why(nbytes, folder)}, where writing failed ({fault.strerror}); {_FIX}") from fault

    def read(self, tokens: slice) -> Tensor:
        """The maps of some tokens, `[d_out, g, d_in]`."""
        d_out, length, d_in = self._shape
        found = torch.empty(d_out, tokens.stop - tokens.start, d_in, dtype=self._dtype)
        size = d_in * self._dtype.itemsize
        for row, part in enumerate(found.view(torch.uint8).numpy()):
            if os.preadv(self._file.fileno(), [part.data], (row * length + tokens.start) * size) != part.nbytes:
                raise OutputError("a temporary file was cut short while it was read: free its disk, and try again")
        return found


_FIX = "give more memory, or set TMPDIR to a folder on another disk"


def _why(nbytes: int, folder: str) -> str:
    return f"a dense map of {nbytes / 1e9:.2f} GB is beyond the memory budget, and goes to {folder}"
