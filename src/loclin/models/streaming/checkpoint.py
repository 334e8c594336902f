"""A checkpoint's safetensors files: where each tensor lies, and reading of many at once into memory that is there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.models.streaming.page_cache import PageCache

Bytes = NDArray[np.uint8]
ALIGNMENT = 64
"""Bytes: that of torch's own memory."""
State = tuple[int, int, int, int]
"""The device, inode, size and time of change of a file."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I32": torch.int32,
    "I64": torch.int64,
}
_HEADER_BYTES = 100_000_000  # as in safetensors itself
_MOST_PIECES = 512  # of one read; systems take 1024
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    path: Path
    start: int  # in bytes from the beginning of the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    __repr__ = brief

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize

    def place(self, start: int) -> int:
        """The first place from `start` on that is aligned as in the file, from where transformers maps it.

        Kernels may add in another order where memory is aligned differently; so they do not.
        """
        shift = self.start % ALIGNMENT if self.start % self.dtype.itemsize == 0 else 0
        return start + (shift - start) % ALIGNMENT


class Checkpoint:
    """The tensors of a directory's `model.safetensors`, or of the files that its index names; `tensors` by name.

    `quantised` says whether tensors may have the dtypes that only quantised weights have.
    Cost: a read of the headers. ModelError where a file is missing, damaged, or cut off.
    """

    def __init__(self, directory: Path, quantised: bool = False) -> None:
        if not hasattr(os, "preadv"):
            raise ModelError("this system cannot read layers straight into memory (os.preadv): load without stream")
        dtypes = DTYPES | _QUANTISED if quantised else DTYPES
        self.tensors: dict[str, StoredTensor] = {}
        self._states: dict[Path, State] = {}
        for path, names in _files(directory):
            self._states[path] = _state(path)
            found = {tensor.name: tensor for tensor in _read_header(path, self._states[path][2], dtypes)}
            lost = sorted(names - found.keys())
            if lost:
                raise ModelError(f"{path} lacks {lost[0]}, which the index says it holds: get the file again")
            self.tensors |= {name: tensor for name, tensor in found.items() if not names or name in names}
        self._cache = PageCache({path: size for path, (_, _, size, _) in self._states.items()})

    def read(self, wanted: Sequence[tuple[StoredTensor, Bytes]]) -> None:
        """Read tensors, each into its own bytes. Cost: one system call for up to 512 neighbours in a file.

        ModelError where a file is gone, altered, or another one than when the checkpoint was opened.
        """
        for path in dict.fromkeys(tensor.path for tensor, _ in wanted):
            pieces = sorted(
                ((tensor, into) for tensor, into in wanted if tensor.path == path and tensor.nbytes),
                key=lambda piece: piece[0].start,
            )
            if not pieces:
                continue
            first = pieces[0][0].name
            self._check(path, first)
            try:
                file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as fault:
                raise ModelError(
                    f"cannot read {first} in {path}: {fault.strerror}; it was there when the model loaded"
                ) from fault
            try:
                runs = list(_neighbours(pieces))
                spans = [(run[0][0].start, sum(tensor.nbytes for tensor, _ in run)) for run in runs]
                for start, size in spans:
                    self._cache.announce(file, start, size)
                for run, (start, size) in zip(runs, spans, strict=True):
                    _read_run(file, run)
                    self._cache.release(file, path, start, size)
            finally:
                os.close(file)
            self._check(path, first)  # a change while it was read

    def _check(self, path: Path, name: str) -> None:
        """Refuse a file that changed since it was opened, from which a tensor is to be read."""
        if _state(path, f"{name} in ") != self._states[path]:
            raise ModelError(
                f"{path} was altered or replaced since the model was loaded ({name} is read from it): load the model "
                "again"
            )


def _state(path: Path, what: str = "") -> State:
    try:
        found = path.stat()
    except OSError as fault:
        raise ModelError(f"cannot read {what}{path}: {fault.strerror}; get the file again") from fault
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _files(directory: Path) -> Iterator[tuple[Path, set[str]]]:
    """The files, each with the names of the tensors that are read from it; no names are all."""
    index = directory / _INDEX
    if (single := directory / "model.safetensors").exists():
        yield single, set()
        return
    if not index.exists():
        raise ModelError(
            f"{directory} has neither model.safetensors nor {_INDEX}: to load it without stream, or save it with "
            "save_pretrained first, which writes them"
        )
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {
            name: {key for key, place in places.items() if place == name} for name in sorted(set(places.values()))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(f"{index} is damaged ({type(fault).__name__}): get it again") from fault
    for name, keys in shards.items():
        if Path(name).name != name:
            raise ModelError(f"{index} names the file {name!r}, outside its directory: get it again")
        if not (directory / name).is_file():
            raise ModelError(f"{directory} lacks {name}, which holds {min(keys)}: get the file")
        yield directory / name, keys


def _read_header(path: Path, size: int, dtypes: dict[str, torch.dtype]) -> Iterator[StoredTensor]:
    """The tensors of one file; ModelError unless they fill it exactly, one behind the other."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        found, end = [], 0
        for name, entry in entries:
            if entry["dtype"] not in dtypes:
                raise ModelError(
                    f"{path} stores {name} as {entry['dtype']}: stream takes {', '.join(dtypes)}; load it "
                    "without stream"
                )
            start, stop = entry["data_offsets"]
            tensor = StoredTensor(name, path, 8 + length + start, dtypes[entry["dtype"]], tuple(entry["shape"]))
            if start != end or stop - start != tensor.nbytes:
                raise ValueError(f"{name} does not lie where its shape says")
            found.append(tensor)
            end = stop
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(f"{path} is cut off or damaged ({fault}): get it again") from fault
    except OSError as fault:
        raise ModelError(f"cannot read {path}: {fault.strerror}; get the file again") from fault
    if size != 8 + length + end:
        raise ModelError(f"{path} has {size} bytes where its header says {8 + length + end}{lost(path)}: get it again")
    yield from found


def lost(path: Path) -> str:
    """Name the first tensor that a file is too short for, as the end of a sentence; empty if there is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _HEADER_BYTES)))
        header.pop("__metadata__", None)
        there = path.stat().st_size - 8 - length
        ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items())
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return ""  # the header itself is damaged, or gone: no tensor is known
    return next((f", and ends before {name} does" for end, name in ends if end > there), "")


def _neighbours(pieces: Sequence[tuple[StoredTensor, Bytes]]) -> Iterator[list[tuple[StoredTensor, Bytes]]]:
    """Group tensors that lie one behind the other in a file."""
    run: list[tuple[StoredTensor, Bytes]] = []
    for tensor, into in pieces:
        if run and (run[-1][0].start + run[-1][0].nbytes != tensor.start or len(run) == _MOST_PIECES):
            yield run
            run = []
        run.append((tensor, into))
    if run:
        yield run


def _read_run(file: int, run: Sequence[tuple[StoredTensor, Bytes]]) -> None:
    """Read neighbours; a system call may return before it has read everything."""
    offset = run[0][0].start
    rest = [(tensor, into.data) for tensor, into in run]
    while rest:
        try:
            count = os.preadv(file, [view for _, view in rest], offset)
        except OSError as fault:
            raise ModelError(f"cannot read {rest[0][0].name} in {rest[0][0].path}: {fault.strerror}") from fault
        if not count:
            raise ModelError(f"{rest[0][0].path} ends before {rest[0][0].name} does: get the file again")
        offset += count
        while rest and count >= len(rest[0][1]):
            count -= len(rest[0][1])
            rest.pop(0)
        if count:
            rest[0] = rest[0][0], rest[0][1][count:]
