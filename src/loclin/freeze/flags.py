"""The process-wide switches by which torch multiplies less precisely than a tensor's dtype says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_backends: Any = torch.backends
_NEW = hasattr(_backends.cuda.matmul, "fp32_precision")
"""Whether torch has a switch for each operation. The older ones then raise where both kinds have been set."""
_ROOMS = (_backends.cuda.matmul, *(getattr(_backends.cudnn, name, None) for name in ("conv", "rnn")))
_ROOMS_CPU = tuple(getattr(_backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn"))
_SWITCHES: tuple[tuple[Any, str, Any], ...] = (
    *((room, "fp32_precision", "ieee") for room in (*_ROOMS, *_ROOMS_CPU) if hasattr(room, "fp32_precision")),
    *(() if _NEW else ((_backends.cuda.matmul, "allow_tf32", False), (_backends.cudnn, "allow_tf32", False))),
    (_backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (_backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
)
"""(where, name, exact value)."""


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No TF32 and no reduced-precision sums inside; on leaving, every switch is as it was, also after an error.

    The switches belong to the process: what other threads compute meanwhile is exact too.
    """
    with ExitStack() as stack:
        if not _NEW:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for room, name, exact in _SWITCHES:
            before = getattr(room, name)
            if before != exact:
                stack.callback(setattr, room, name, before)
                setattr(room, name, exact)
        yield
