"""A dense map in a NumPy file that is written row by row; an interrupted run is resumed."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from loclin.common.access import reason
from loclin.common.progress import bar
from loclin.errors import OptionError, OutputError, ResultError
from loclin.models.quiet import status
from loclin.results.files import check_writable, write_text
from loclin.results.sweep_file import SweepFile

FORMAT = "loclin dense map 1"
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Allows a mapping larger than memory: only pages that are written take memory. (Python names it from 3.13 on.)"""


class DenseFile:
    """A dense map `[d_out, T, d_in]` in the file `path`, with a description in `PATH.json`.

    Until all rows are written, they are in `PATH.partial`, and the `.json` counts the rows that are on the disk; the
    hidden `.sweep` file has the state of the sweep for the next ones. The hidden `.lock` file may be deleted while no
    process writes. The `key`, of JSON values, identifies the map: a file with another key is refused. Raises
    OptionError for a dtype that NumPy does not have.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: tuple[int, int, int], dtype: torch.dtype, key: dict[str, Any]
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self._beside = self.path.with_name(f"{self.path.name}.json")
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._fix = f"delete it and {self._beside.name}, or choose another path"
        self._shape, self._dtype = shape, dtype
        self._key = json.loads(json.dumps(key))
        self._header = _make_header(shape, dtype)
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def obtain(self, rows_from: Callable[[int], Iterator[tuple[slice, Tensor]]]) -> Tensor:
        """Open the file, after writing the rows that are missing.

        `rows_from(start)` yields the rows from `start` on, in order. A second process waits for the first one. The
        tensor `[d_out, T, d_in]` on the CPU is read from the file on demand; writing to it does not change the file.

        Raises OutputError when the file cannot be written, or the disk has no room for it; ResultError when the file is
        of another map, or was altered.
        """
        if not os.path.isfile(self.path):  # noqa: PTH113 - it never raises
            check_writable(self.path)
        if (found := self._read()) is None:
            with self._lock():
                if (found := self._read()) is None:
                    try:
                        self._write(rows_from)
                    except OSError as error:
                        raise OutputError(f"cannot write {self.path}: {reason(error, self.path)}") from error
                    found = self._read()
        assert found is not None
        return found

    def sweep(self, where: slice) -> SweepFile:
        """Where the sweep for some rows keeps its state, for as long as they are not written."""
        left = (self._shape[0] - where.start) * self._row_bytes
        key = self._key | {"rows": [where.start, where.stop]}
        return SweepFile(self.path.with_name(f".{self.path.name}.sweep"), key, left)

    def _read(self) -> Tensor | None:
        """Open the file; errors of the operating system become errors of loclin."""
        try:
            return self._open()
        except OSError as error:
            raise ResultError(
                f"cannot read {self.path}: {reason(error, self.path)}; chmod it or choose another path"
            ) from error

    def _open(self) -> Tensor | None:
        """Map the complete file into memory; None if it is not written yet."""
        done = self._rows_done()
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            whole = len(self._header) + self._shape[0] * self._row_bytes
            size = os.fstat(file.fileno()).st_size
            if done != self._shape[0] or size != whole or file.read(len(self._header)) != self._header:
                raise ResultError(f"{self.path} is not as it was written ({size:,} bytes, not {whole:,}): {self._fix}")
            mapped = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        count = math.prod(self._shape)
        return torch.frombuffer(mapped, dtype=self._dtype, count=count, offset=len(self._header)).reshape(self._shape)

    def _rows_done(self) -> int:
        """Read from `PATH.json` how many rows are written; refuse files of other maps."""
        try:
            record = json.loads(self._beside.read_text(encoding="utf-8"))
            done, key, known = record["rows"], record["key"], record["format"] == FORMAT
        except FileNotFoundError:
            if self.path.exists():
                raise ResultError(f"{self.path} exists already, and is not by loclin: {self._fix}") from None
            return 0
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{self._beside} cannot be read ({error}): {self._fix}") from error
        if not known:
            raise ResultError(f"{self._beside} has another format than {FORMAT!r}: {self._fix}")
        if key != self._key:
            differing = ", ".join(name for name in {**key, **self._key} if key.get(name) != self._key.get(name))
            raise ResultError(f"{self.path} is of another map (different: {differing}): {self._fix}")
        return done

    def _write(self, rows_from: Callable[[int], Iterator[tuple[slice, Tensor]]]) -> None:
        total, start = self._shape[0], len(self._header)
        there = self._partial.stat().st_size - start if self._partial.exists() else 0
        done = max(0, min(self._rows_done(), there // self._row_bytes))
        needed, free = (total - done) * self._row_bytes, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OutputError(
                f"cannot write {self.path}: it takes {needed / 1e9:.3g} GB more and {free / 1e9:.3g} GB are free; "
                "make room or choose a path on another disk"
            )
        with self._partial.open("r+b" if done else "wb") as file:
            if not done:
                file.write(self._header)
            file.seek(start + done * self._row_bytes)
            file.truncate()
            self._note(done)
            with bar(total=total, initial=done, desc="dense map", unit="row") as progress_bar:
                for where, part in rows_from(done):
                    for row in part:  # one by one: writing a whole chunk, which is laid out by token, would copy it
                        file.write(row.contiguous().cpu().numpy())
                    file.flush()
                    os.fsync(file.fileno())
                    self._note(where.stop)
                    self.sweep(where).remove()
                    progress_bar.update(len(part))
        self._partial.replace(self.path)

    def _note(self, done: int) -> None:
        """Record how many rows are on the disk."""
        record = {"format": FORMAT, "rows": done, "of": self._shape[0], "shape": self._shape, "key": self._key}
        write_text(self._beside, json.dumps(record, ensure_ascii=False, indent=1))

    def _lock(self) -> AbstractContextManager[object]:
        """Take the lock of the file, so that only one process writes, until the end of a `with`."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            with status(f"Waiting for another process that is writing {self.path.name} …"):
                return lock.acquire()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {reason(error, self.path)}; choose another path") from error


def _make_header(shape: tuple[int, int, int], dtype: torch.dtype) -> bytes:
    """Make the header of a `.npy` file."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        raise OptionError(f'NumPy has no {name}, so no file can hold this map; linearize with precision="single"')
    header = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(name)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()
