"""Arrays for a page: as few digits as a sum needs, and as few bytes as a browser's own gzip gives.

Vectors are stored as whole multiples of one step. So sums of them are exact, and numbers that are small beside the step
take few bits once they are compressed.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]
_CLOSE = 0.9
_TRIES = 12


def round_to(values: NDArray[Any], step: float) -> Whole:
    """Round to whole multiples of a step."""
    return np.rint(np.asarray(values, dtype=np.float64) / step).astype(np.int64)


def round_sums(values: NDArray[Any], step: float) -> Whole:
    """Round to whole multiples of a step so that the sum over any rectangle `[a:b, c:d]` is off by two steps at most.

    The sums up to each place are rounded, and their differences are stored: errors do not add up.
    """
    rounded = np.empty(values.shape, dtype=np.int64)
    for last in range(0, values.shape[2], 64):  # in parts, for the memory
        part = values[:, :, last : last + 64].astype(np.float64)
        sums = round_to(part.cumsum(0).cumsum(1), step)
        rounded[:, :, last : last + 64] = np.diff(np.diff(sums, axis=0, prepend=0), axis=1, prepend=0)
    return rounded


def find_step(size: float, miss: Callable[[float], float]) -> float:
    """Find about the largest step that misses by 1 at most; misses grow in proportion to it."""
    step = size / 127
    for _ in range(_TRIES):
        missed = miss(step)
        if missed <= 1:
            break
        step *= min(_CLOSE / missed, 0.5)
    return step


def pack(arrays: Mapping[str, Whole]) -> tuple[dict[str, Any], str]:
    """Write arrays as base64 of gzip, and where each one is: its place, the bytes of a number, and its shape.

    First come the lowest bytes of all numbers, then the next ones: bytes that are alike lie together. Signs are in the
    lowest bit (0, -1, 1, -2, ... are 0, 1, 2, 3, ...), so that the upper bytes of small numbers are zero.
    """
    about: dict[str, Any] = {}
    parts: list[bytes] = []
    at = 0
    for name, values in arrays.items():
        folded = np.where(values < 0, -2 * values - 1, 2 * values)
        size = next(size for size in (1, 2, 3, 4) if folded.max(initial=0) < 2 ** (8 * size))
        plain = np.ascontiguousarray(folded, dtype="<u4")
        about[name] = {"at": at, "size": size, "shape": list(values.shape)}
        parts.append(plain.reshape(-1).view(np.uint8).reshape(-1, 4)[:, :size].T.tobytes())
        at += len(parts[-1])
    return about, base64.b64encode(gzip.compress(b"".join(parts), 6, mtime=0)).decode()
