"""Weights of GPTQ, AWQ and HQQ checkpoints, dequantised one by one while a model takes them.

GPTQ and AWQ store small integers q, packed into int32, with a scale s and a zero z for each group of inputs:

    W[o, i] = s[g(i), o] (q[i, o] - z[g(i), o])

In float32 that is exact: the difference has at most 9 bits, and a float16 scale 11. GPTQ (Frantar et al. 2022) packs
q along the inputs, AWQ (Lin et al. 2023) along the outputs; both pack z along the outputs. HQQ is in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from loclin.errors import ModelError
from loclin.models import hqq

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which of the eight numbers in an int32 is each of eight neighbours, in AWQ."""
_LAYOUTS = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2"), (2, 4, 8)),
    "awq": ("version", ("gemm",), (4,)),
}
"""The option that names a method's layout, the layouts that are read (the first by default), and the bits."""
_INTEGERS = ("qweight", "qzeros", "scales")
_PARTS = {"awq": _INTEGERS, "gptq": _INTEGERS, "hqq": hqq.PARTS}
"""How the names of a weight's parts end, without which it has no value; the first holds q."""
_BESIDE = {"awq": (), "gptq": ("g_idx",), "hqq": hqq.SETTINGS}
"""How the names end of what some checkpoints store beside them: the group of each input, and settings."""


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is made when the loader slices it, as it does with those of a file."""

    make: Callable[[], Tensor]

    def __getitem__(self, _all: object) -> Tensor:
        return self.make()


def read_packed(directory: Path, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The state dict of a GPTQ, AWQ or HQQ checkpoint with plain weights, each of them made when it is sliced.

    `settings` is its `quantization_config`. ModelError for a layout that is not known, or a part that is missing.
    """
    refuse_layout(settings, name)
    places = _find_tensors(directory)
    state: dict[str, Any] = {key: _Lazy(partial(_read, {key: path})) for key, path in places.items()}
    for path, names in find_weights(places, settings["quant_method"]).items():
        for part in names:
            if part not in state:
                raise ModelError(f"{name} lacks {part}, without which {names[0]} has no meaning; get it again")
            del state[part]
        parts = {part: places[part] for part in names}
        state[f"{path}.weight"] = _Lazy(partial(_read, parts, decoder(path, names, settings)))
    return state


def find_weights(keys: Collection[str], method: str) -> dict[str, tuple[str, ...]]:
    """The names of all parts of each quantised weight, that of q first, by its layer's path; some may not be there."""
    paths = [key.removesuffix(f".{_PARTS[method][0]}") for key in keys if key.endswith(f".{_PARTS[method][0]}")]
    return {
        path: (
            *(f"{path}.{part}" for part in _PARTS[method]),
            *(f"{path}.{part}" for part in _BESIDE[method] if f"{path}.{part}" in keys),
        )
        for path in paths
    }


def decoder(path: str, names: Sequence[str], settings: Mapping[str, Any]) -> Callable[..., Float[Tensor, "out in"]]:
    """The function that gives a weight in float32 from its parts, in the order of their names."""

    def dequantise(*tensors: Tensor) -> Tensor:
        parts = {part.removeprefix(f"{path}."): tensor for part, tensor in zip(names, tensors, strict=True)}
        return hqq.dequantise(parts, path) if settings["quant_method"] == "hqq" else _dequantise(parts, settings, path)

    return dequantise


def refuse_layout(settings: Mapping[str, Any], name: str) -> None:
    """ModelError for a layout, or a number of bits, that is not known."""
    method, bits = settings["quant_method"], settings.get("bits", 4)
    if method not in _LAYOUTS:
        return  # each weight names its own
    _, layouts, widths = _LAYOUTS[method]
    layout = _layout(settings)
    if layout not in layouts or bits not in widths:
        raise ModelError(
            f"{name}: {method} with {bits} bits in the layout {layout!r} is not read; known are the layouts "
            f"{', '.join(layouts)} with {', '.join(map(str, widths))} bits"
        )


def _layout(settings: Mapping[str, Any]) -> str:
    option, layouts, _ = _LAYOUTS[settings["quant_method"]]
    return str(settings.get(option, layouts[0])).lower()


def _find_tensors(directory: Path) -> dict[str, Path]:
    """In which file of a directory each tensor is."""
    places: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if not places:
        raise ModelError(f"{directory} has no safetensors files; give a checkpoint in that format")
    return places


def _read(places: Mapping[str, Path], decode: Callable[..., Tensor] | None = None) -> Tensor:
    """A tensor, or what is decoded from several; each file is opened once, since its header may name thousands."""
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(places.values()):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key, place in places.items() if place == path}
    found = [tensors[key] for key in places]
    return found[0] if decode is None else decode(*found)


def _dequantise(parts: Mapping[str, Tensor], settings: Mapping[str, Any], path: str) -> Float[Tensor, "out in"]:
    (q, z, s), group = (parts[name] for name in _INTEGERS), parts.get("g_idx")
    bits, most = settings.get("bits", 4), settings.get("group_size", -1)
    if settings["quant_method"] == "gptq":
        q, z = _unpack(q.T, bits), _unpack(z, bits)  # [out, in], [groups, out]
        if _layout(settings) == "gptq":  # it stores one less, and lets -1 wrap around
            z = (z + 1) & (2**bits - 1)
    else:
        q, z = (_unpack(part, bits).unflatten(1, (-1, 8))[..., _PLACES].flatten(1) for part in (q, z))
        q = q.T
    width = q.shape[1]
    group = torch.arange(width) // (most if most > 0 else width) if group is None else group.long()
    if len(group) != width or group.max() >= len(s) or group.min() < 0:
        raise ModelError(f"{path} has {len(s)} groups of {width} inputs, and its config says {most} for each")
    weight = (q - z[group].T).to(torch.float32)
    return weight.mul_(s.to(torch.float32)[group].T)


def _unpack(packed: Int[Tensor, "rows words"], bits: int) -> Int[Tensor, "rows numbers"]:
    """The unsigned numbers of so many bits in each int32, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1).to(torch.int16)
