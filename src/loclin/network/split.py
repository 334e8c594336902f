"""Float32 products made of bfloat16 ones, which processors do many times as fast (`precision="split"`).

A float32 number is the sum of three bfloat16 numbers, and the product of two bfloat16 numbers is exact in float32. So
where bfloat16 holds a weight, three bfloat16 products with the pieces of what is multiplied, summed in float32, are as
accurate as the float32 product. Where neither factor is such a weight, six products are: pieces of both, but for those
below a unit in the last place.

CUDA multiplies bfloat16 tensors into float32. A CPU rounds such a product to bfloat16; there pieces are held as float32
numbers, and a switch of torch lets its products read them as bfloat16 ones. That switch belongs to the whole process:
it is on during a product, and only while no other thread can multiply. Beside other threads products are float32 ones.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.network.blocks import Workspace

_LARGEST = torch.finfo(torch.bfloat16).max
_ROWS = 1024  # of a weight that are looked at together
_IDLE = ("tqdm", "rich")
"""Packages whose threads draw, and multiply nothing."""
_OWN = "loclin-"
"""How the names of our threads begin that only read files."""


@dataclass(frozen=True)
class Split:
    """Which products of a trace are split, and why; by default none.

    Attributes
    ----------
    layers: by layer, whether its products with weights are split; empty where none is.
    formed: whether products with matrices that are formed of two weights are, too.
    note: what was decided, and why; None where nobody asked.
    """

    layers: tuple[bool, ...] = ()
    formed: bool = False
    note: str | None = None

    __repr__ = brief

    def at(self, layer: int) -> Split | None:
        """Itself for a layer whose products are split, else None."""
        return self if self.layers and self.layers[layer] else None


def is_held(weight: Tensor) -> bool:
    """Whether bfloat16 holds every number of a weight. Cost: two passes over it, unless it is stored so."""
    if weight.dtype == torch.bfloat16:
        return True
    return all(torch.equal(rows.bfloat16().to(rows.dtype), rows) for rows in weight.split(_ROWS))


def piece_dtype(device: torch.device) -> torch.dtype:
    """In which the factors of split products are held."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def pieces(x: Float[Tensor, "*n k"], workspace: Workspace, name: str) -> Iterator[Float[Tensor, "*n k"]]:
    """Three tensors of bfloat16 numbers that sum to x, the largest first, held in `piece_dtype`.

    Exact for all finite numbers but those below 1e-33, whose last bits bfloat16 does not have; infinities become NaN.
    """
    like, rest = x.new_empty(0, dtype=piece_dtype(x.device)), x
    for i in range(2):
        rounded = rest.clamp(-_LARGEST, _LARGEST).bfloat16()  # the largest float32 numbers would become infinite
        piece = workspace(f"{name} {i}", like, *x.shape).copy_(rounded)
        yield piece
        rest = torch.sub(rest, piece, out=workspace(f"{name} rest", x, *x.shape))
    yield rest.to(like.dtype)  # eight bits are left


def multiply(
    x: Float[Tensor, "n k"], held: Float[Tensor, "k m"], workspace: Workspace, out: Tensor, add: bool = False
) -> Float[Tensor, "n m"]:
    """`x W` in `out`, or added to it, for a weight in the dtype of pieces. Cost: three bfloat16 products."""
    with _bfloat16_units(x.device) as usable:
        for number, piece in enumerate(pieces(x, workspace, "split rows") if usable else [x]):
            _multiply(piece, held, out, add or number > 0)
    return out


def multiply_both(
    x: Float[Tensor, "*g n k"], y: Float[Tensor, "*g k m"], workspace: Workspace, out: Tensor
) -> Float[Tensor, "*g n m"]:
    """`x y` in `out` for any two float32 matrices, or batches of them. Cost: six bfloat16 products."""
    with _bfloat16_units(x.device) as usable:
        of_y = list(pieces(y, workspace, "split matrix")) if usable else [y]
        for number, piece in enumerate(pieces(x, workspace, "split rows") if usable else [x]):
            for other in of_y[: len(of_y) - number]:
                _multiply(piece, other, out, other is not of_y[0] or number > 0)
    return out


def is_alone() -> bool:
    """Whether no other thread of this process can multiply."""
    current = threading.current_thread()
    idle = {
        thread.ident
        for thread in threading.enumerate()
        if thread is current or type(thread).__module__.partition(".")[0] in _IDLE or thread.name.startswith(_OWN)
    }
    return sys._current_frames().keys() <= idle


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """One product of pieces, in float32."""
    product: Any = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == torch.bfloat16:
        found = product(a, b, out_dtype=torch.float32)
        out.add_(found) if add else out.copy_(found)
    elif add:
        (torch.addmm if a.dim() == 2 else torch.baddbmm)(out, a, b, out=out)
    else:
        product(a, b, out=out)


@contextmanager
def _bfloat16_units(device: torch.device) -> Iterator[bool]:
    """Let a CPU's products read float32 numbers as bfloat16 ones; whether pieces may be multiplied so."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu":
        yield True
        return
    if not hasattr(matmul, "fp32_precision") or not is_alone():
        yield False
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield True
    finally:
        matmul.fp32_precision = before
