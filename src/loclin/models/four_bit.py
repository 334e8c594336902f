"""Four-bit layers of bitsandbytes: which to make, and which kernel they use on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loclin.errors import ModelError, OptionError
from loclin.models.options import installed

PACKING = "support_avx512bf16_for_cpu"
"""The flag of bitsandbytes that a layer's weight may be packed for a bfloat16 kernel, on CPUs that have one."""
KINDS = ("nf4", "fp4")


def four_bits(kind: str, dtype: torch.dtype | str) -> Any:
    """The `quantization_config` that quantises weights to four bits while loading, and computes in a dtype."""
    if kind not in KINDS:
        raise OptionError(f"quantization={kind!r}: choose one of {', '.join(KINDS)}, or give a quantization_config")
    if not installed("bitsandbytes"):
        raise ModelError(f"quantization={kind!r} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    computes = torch.float32 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=computes)


def keep_from_packing(model: nn.Module) -> None:
    """Make every four-bit layer compute in its own `compute_dtype` on every CPU; the first forward pass packs it."""
    for module in model.modules():
        if hasattr(module, PACKING):
            setattr(module, PACKING, False)
