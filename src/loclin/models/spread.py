"""Puts a model on devices that share its work: on the first, or its layers on all of them where it does not fit."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from loclin.common.free_memory import available
from loclin.errors import ModelError, OptionError
from loclin.models.lease import largest_layer_bytes
from loclin.models.options import require

_FILLED = 0.8
"""Of a device's free memory, by weights; the rest is for prompts."""


def refuse_sharing(hf: PreTrainedModel, devices: Sequence[torch.device], name: str) -> None:
    """Refuse a model whose weights cannot be copied to other devices, or that lives on one that is not among them."""
    if largest_layer_bytes(hf) > 0 or any(weight.is_meta for weight in hf.parameters()):
        raise OptionError(f"devices= and weights on disk: {name} has weights that are not in memory; give one of them")
    if getattr(hf, "hf_quantizer", None) is not None or any(map(is_traceable_wrapper_subclass, hf.parameters())):
        raise OptionError(
            f"devices= copies plain weights, and {name} is quantised: leave devices out, or load it plain"
        )
    elsewhere = {weight.device for weight in hf.parameters()} - {*devices}
    if elsewhere:
        place = min(map(str, elsewhere))
        raise OptionError(f"{name} is on {place}, which is not among devices=: name {place} too, or move the model")


def put(hf: PreTrainedModel, devices: Sequence[torch.device], name: str) -> None:
    """Move a model from the CPU to the first device, or, where it does not fit, its layers to all of them.

    ModelError, which says what would fit, where they have too little memory together.
    """
    size = sum(weight.nbytes for weight in {*hf.parameters(), *hf.buffers()})
    room = {device: int(available(device) * _FILLED) for device in devices if device.type != "cpu"}
    if not room or size <= room[devices[0]]:
        module: nn.Module = hf  # transformers' own `to` has no types
        module.to(devices[0])
        return
    if size > sum(room.values()):
        raise ModelError(
            f"{name} takes {size / 1e9:.1f} GB and {', '.join(map(str, devices))} have room for "
            f"{sum(room.values()) / 1e9:.1f} GB: name more devices, free their memory, or give dtype='bfloat16'"
        )
    require("accelerate", "a model on several devices", "accelerate")
    accelerate: Any = importlib.import_module("accelerate")
    places = accelerate.infer_auto_device_map(
        hf,
        max_memory={device.index: nbytes for device, nbytes in room.items()},
        no_split_module_classes=list(hf._no_split_modules or ()),
    )
    if {"cpu", "disk"} & {*places.values()}:
        raise ModelError(f"{name} takes {size / 1e9:.1f} GB, and its layers do not fit {', '.join(map(str, devices))}")
    accelerate.dispatch_model(hf, places)
