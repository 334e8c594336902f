"""Four-bit layers of bitsandbytes: which kernel they use on a CPU."""

from __future__ import annotations

from torch import nn

PACKING = "support_avx512bf16_for_cpu"
"""The flag of bitsandbytes that a layer's weight may be packed for a bfloat16 kernel, on CPUs that have one."""


def keep_from_packing(model: nn.Module) -> None:
    """Make every four-bit layer compute in its own `compute_dtype` on every CPU; the first forward pass packs it."""
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)
