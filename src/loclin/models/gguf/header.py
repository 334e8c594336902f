"""The header of a GGUF file: is the file complete, and how are its weights stored.

Read here, and not by `gguf.GGUFReader`, which takes seconds for a large vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loclin.common import access
from loclin.errors import ModelError
from loclin.models.options import require

# value type -> struct code; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """What loclin needs to know about a GGUF file before it converts it."""

    architecture: str
    stored_dtype: str
    n_elements: int


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.data):
            raise struct.error("string beyond the end")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner in SCALARS:  # arrays, mostly the vocabulary, are skipped
            self.at += count * struct.calcsize("<" + SCALARS[inner])
        else:
            for _ in range(count):
                self.value(inner)
        return None


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header, and check that every tensor it promises lies inside the file."""
    require("gguf", f"Reading {path.name}", "gguf")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: check the path")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data)
    except (struct.error, KeyError, ValueError, RecursionError, OverflowError) as fault:
        raise ModelError(f"{path} is cut off or damaged ({fault}): get it again") from fault
    except OSError as fault:
        raise ModelError(f"cannot read {path}: {access.reason(fault, path)}") from fault


def _parse(data: mmap.mmap) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    cursor = _Cursor(data, at=4)
    version, n_tensors, n_fields = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string()
        fields[key] = cursor.value(cursor.take("I"))

    n_elements, end, largest = 0, 0, (0, "unknown")
    for _ in range(n_tensors):
        cursor.string()
        shape = [cursor.take("Q") for _ in range(cursor.take("I"))]
        kind, offset = GGMLQuantizationType(cursor.take("I")), cursor.take("Q")
        block, n_bytes = GGML_QUANT_SIZES[kind]
        n_elements += prod(shape)
        end = max(end, offset + prod(shape) // block * n_bytes)
        largest = max(largest, (prod(shape), kind.name))
    alignment = fields.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    if start + end > len(data):
        raise ValueError(f"it needs {start + end:,} bytes and has {len(data):,}")

    try:
        stored = LlamaFileType(fields["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):  # not every writer says; then the largest tensor decides
        stored = largest[1]
    return GgufHeader(fields["general.architecture"], f"{stored} gguf", n_elements)
