"""Quantised weights of a checkpoint: which stored tensors each is made of, and how these are dequantised together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.errors import ModelError
from loclin.models import packed
from loclin.models.options import installed
from loclin.models.quantisation import PACKED
from loclin.models.streaming.checkpoint import DTYPES, Checkpoint, StoredTensor
from loclin.models.streaming.plan import Packed

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"


def find_quantised(checkpoint: Checkpoint, settings: Mapping[str, Any], name: str) -> list[Packed]:
    """A checkpoint's quantised weights, by the names that plain ones would have.

    `settings` is the `quantization_config`. ModelError where a tensor that belongs to a weight is missing, or one is
    stored in another way. Cost: for bitsandbytes, a small read for each weight.
    """
    refuse_unknown(settings, name)
    try:
        found = _METHODS[settings["quant_method"]](checkpoint, settings)
    except _LostError as lost:
        raise ModelError(f"{name} lacks {lost.part}, without which {lost.weight} has no value: get it again") from None
    parts = {part.name for weight in found for part in weight.parts}
    for key, stored in checkpoint.tensors.items():
        if key not in parts and stored.dtype not in DTYPES.values():
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(f"{name} stores {key} as {kind}, which {settings['quant_method']} gives no meaning")
    return found


def refuse_unknown(settings: Mapping[str, Any], name: str) -> None:
    """ModelError for a method of quantisation that streaming does not know. Free."""
    method = settings.get("quant_method")
    if method not in _METHODS or (method == "bitsandbytes" and not settings.get("load_in_4bit")):
        raise ModelError(
            f"{name} is quantised ({method}), and stream takes plain weights, or those of {', '.join(_METHODS)} "
            "(of bitsandbytes four bits): load it without stream"
        )
    if method in PACKED:
        packed.refuse_layout(settings, name)
    if method == "bitsandbytes" and not installed("bitsandbytes"):
        raise ModelError(f"{name} has four-bit weights, which need bitsandbytes: pip install bitsandbytes")


class _LostError(Exception):
    """A quantised weight without one of its parts."""

    def __init__(self, weight: str, part: str) -> None:
        super().__init__(part)
        self.weight, self.part = weight, part


def _find_four_bit(checkpoint: Checkpoint, _settings: Mapping[str, Any]) -> list[Packed]:
    """Weights of bitsandbytes, NF4 or FP4: bytes, and a state whose settings are JSON inside a tensor."""
    found = []
    for weight, stored in checkpoint.tensors.items():
        if stored.dtype != torch.uint8 or not weight.endswith(".weight"):
            continue
        prefix = f"{weight}.quant_state.bitsandbytes__"
        state_key = next((key for key in checkpoint.tensors if key.startswith(prefix)), None)
        if state_key is None:
            raise _LostError(weight, f"{prefix}nf4")
        state = json.loads(bytes(_read(checkpoint, checkpoint.tensors[state_key]).numpy()))
        nested = ("nested_absmax", "nested_quant_map") if "nested_blocksize" in state else ()
        names = ("absmax", "quant_map", *nested, state_key.removeprefix(f"{weight}."))
        parts = [stored, *(_part(checkpoint, weight, f"{weight}.{part}") for part in names)]
        found.append(Packed(weight, tuple(parts), tuple(state["shape"]), _four_bit(names)))
    return found


def _four_bit(names: tuple[str, ...]) -> Callable[..., Tensor]:
    def dequantise(data: Tensor, *parts: Tensor) -> Tensor:
        import bitsandbytes.functional as bnb

        state = bnb.QuantState.from_dict(dict(zip(names, parts, strict=True)), torch.device("cpu"))
        return bnb.dequantize_4bit(data, state)

    return dequantise


def _find_fp8(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[Packed]:
    """Weights in 8-bit floats, each with a scale, or one for each block."""
    block = settings.get("weight_block_size")

    def dequantise(weight: Tensor, scale: Tensor) -> Float[Tensor, "... out in"]:
        if scale.dtype == torch.uint8:  # an exponent
            scale = scale.view(torch.float8_e8m0fnu)
        scale = scale.float().reshape(scale.shape if scale.dim() > 1 else (1, 1))
        stored, blocks = list(scale.shape), None if scale.numel() == 1 else block
        for dim in (-2, -1):
            count, size = scale.shape[dim], weight.shape[dim]
            rows = -(-size // count) if blocks is None else blocks[dim]
            if -(-size // rows) != count:
                raise ModelError(
                    f"a weight {list(weight.shape)} has the scales {stored}, and its config says blocks of "
                    f"{block}: give the config and the weights of one model"
                )
            scale = scale.repeat_interleave(rows, dim).narrow(dim, 0, size)  # the last block may be cut
        return weight.float() * scale

    return [
        Packed(weight, (stored, _part(checkpoint, weight, weight + _SCALE)), stored.shape, dequantise)
        for weight, stored in checkpoint.tensors.items()
        if stored.dtype in _FLOAT8
    ]


def _find_mxfp4(checkpoint: Checkpoint, _settings: Mapping[str, Any]) -> list[Packed]:
    """Experts in 4-bit floats `[experts, out, groups, 16]`, two a byte, with an exponent for each group of 32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def dequantise(blocks: Tensor, scales: Tensor) -> Float[Tensor, "experts in out"]:
        return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)

    found = []
    for key, stored in checkpoint.tensors.items():
        if key.endswith(_BLOCKS) and stored.dtype == torch.uint8:
            weight = key.removesuffix(_BLOCKS)
            experts, rows, groups, size = stored.shape
            scales = _part(checkpoint, weight, weight + _SCALES)
            found.append(Packed(weight, (stored, scales), (experts, 2 * groups * size, rows), dequantise))
    return found


def _find_packed(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[Packed]:
    """Weights of GPTQ, AWQ and HQQ: small integers that share words."""
    found = []
    for path, names in packed.find_weights(checkpoint.tensors, settings["quant_method"]).items():
        parts = tuple(_part(checkpoint, names[0], name) for name in names)
        shape = _packed_shape(checkpoint, parts, settings)
        found.append(Packed(f"{path}.weight", parts, shape, packed.decoder(path, names, settings)))
    return found


def _packed_shape(
    checkpoint: Checkpoint, parts: tuple[StoredTensor, ...], settings: Mapping[str, Any]
) -> tuple[int, ...]:
    """The shape of a weight that shares words: from the words, which are the first part; HQQ stores it."""
    method, many = settings["quant_method"], 32 // settings.get("bits", 4)
    if method == "hqq":
        stored = next(part for part in parts if part.name.endswith(".shape"))
        return tuple(_read(checkpoint, stored).view(stored.dtype).tolist())
    rows, columns = parts[0].shape
    return (columns, rows * many) if method == "gptq" else (columns * many, rows)


_METHODS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], list[Packed]]] = {
    "awq": _find_packed,
    "bitsandbytes": _find_four_bit,
    "fp8": _find_fp8,
    "mxfp8": _find_fp8,
    "gptq": _find_packed,
    "hqq": _find_packed,
    "mxfp4": _find_mxfp4,
}


def _part(checkpoint: Checkpoint, weight: str, part: str) -> StoredTensor:
    if part not in checkpoint.tensors:
        raise _LostError(weight, part)
    return checkpoint.tensors[part]


def _read(checkpoint: Checkpoint, stored: StoredTensor) -> Tensor:
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    checkpoint.read([(stored, raw.numpy())])
    return raw
