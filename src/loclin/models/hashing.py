"""Hashes of files, without blocking other threads, and of tensors."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from loclin.models.lease import named_weights

BLOCK, SMALL_BLOCK = 1 << 30, 1 << 27
"""Hashing releases the interpreter lock during a block and takes it back after each, and a parser in another thread may
hold the lock for seconds: fewer blocks wait less (0.5 s of 2 for a gigabyte). Ctrl-C has to wait for one block. Mapped
pages count as the process's memory until a block is done: small ones are for models larger than memory."""


def sha256(*paths: Path, block: int = BLOCK) -> str:
    """Hash files as if they were one, a block at a time. Cost: one read, 250 to 2000 MB/s by processor."""
    digest = hashlib.sha256()
    for path in paths:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            continue
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for start in range(0, len(view), block):
                with view[start : start + block] as some:
                    digest.update(some)
                if hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED, start, min(block, len(view) - start))
    return digest.hexdigest()


def source_hash(*without: str) -> str:
    """Hash the source code of loclin, without some of its rooms: results of other code are not gone on with."""
    home = Path(__file__).parents[1]
    left_out = {home / room for room in without}
    return sha256(*(p for p in sorted(home.rglob("*.py")) if not {p, *p.parents} & left_out))[:16]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in row order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def hash_tensors(named: Iterable[tuple[str, Tensor]], read: Callable[[Tensor], bytes | memoryview]) -> str:
    """Hash names, dtypes and shapes of tensors, and what `read` reads of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(read(tensor))
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """One hash of all weights and buffers; offloaded ones count by name only. Cost: one read, about 600 MB/s."""
    named = chain(named_weights(module), module.named_buffers())  # tied ones once
    return hash_tensors(named, lambda tensor: b"" if tensor.is_meta else tensor_bytes(tensor))
