"""Four-bit layers of bitsandbytes: which kernel they take on a CPU."""

from __future__ import annotations

from torch import nn

PACKING = "support_avx512bf16_for_cpu"
"""Where bitsandbytes notes that a layer's weight may be packed for a bfloat16 kernel, which some CPUs have."""


def keep_from_packing(model: nn.Module) -> None:
    """Have every four-bit layer compute in its own `compute_dtype` on every CPU, whatever its kernels.

    For models that have not run yet: the first forward pass packs the weights.
    """
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)
