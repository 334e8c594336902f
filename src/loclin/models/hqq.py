"""Weights of HQQ checkpoints, from the tensors in which each linear layer stores its settings, too.

HQQ (Badri and Shaji 2023) reshapes a weight so that its groups are rows or columns, and stores small integers q with a
scale s and a zero z, which need not be an integer, for each group:

    W = (q - z) s

in two roundings, which are its library's own in float32. Numbers that share a word are far apart: the first part of
all rows is in the highest bits, the last in the lowest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from loclin.errors import ModelError

PARTS = ("W_q", "scale", "zero", "shape", "packing")
"""The names of a weight's parts: q, s, z, the shape of W, and how q is packed, as text."""
SETTINGS = (
    *("axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits", "offload_meta", "optimize"),
    *("quant_scale", "quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float"),
)
"""The names of what is stored beside them, and says nothing more about the value."""
_PACKINGS = {
    "8bit_u8": (8, torch.uint8),
    "4bit_u8": (4, torch.uint8),
    "3bit_32": (3, torch.int32),
    "2bit_u8": (2, torch.uint8),
    "1bit_u8": (1, torch.uint8),
}
"""The bits of a number, and the word that holds some of them."""


def dequantise(parts: Mapping[str, Tensor], path: str) -> Float[Tensor, "out in"]:
    """One weight in float32, from its parts by their names. ModelError where they do not fit together."""
    packing = "".join(map(chr, parts["packing"].tolist()))
    if packing not in _PACKINGS:
        raise ModelError(f"{path} is packed by hqq as {packing!r}, which is not read; known are {', '.join(_PACKINGS)}")
    bits, word = _PACKINGS[packing]
    most = torch.iinfo(word).bits // bits  # numbers in a word
    words = parts["W_q"].view(word)  # some are stored as floats
    scale, zero = parts["scale"].float(), parts["zero"].float()
    out, width = parts["shape"].tolist()
    columns = words.shape[1]
    rows = out * width // columns
    whole = rows * columns == out * width and len(words) == -(-rows // most)
    if not whole or scale.shape != zero.shape or scale.shape not in {(rows, 1), (1, columns)}:
        raise ModelError(
            f"{path} [{out}, {width}] has {list(words.shape)} words packed as {packing}, scales {list(scale.shape)} "
            f"and zeros {list(zero.shape)}, which do not fit together: get the checkpoint again"
        )
    return ((_unpack(words, bits, most)[:rows] - zero) * scale).reshape(out, width)


def _unpack(words: Num[Tensor, "rows columns"], bits: int, most: int) -> UInt8[Tensor, "numbers columns"]:
    """The numbers in each word: those of all rows in the highest bits are the first ones."""
    parts = [words >> bits * place & 2**bits - 1 for place in reversed(range(most))]
    return torch.cat(parts).to(torch.uint8)
