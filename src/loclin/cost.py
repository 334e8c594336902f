"""What sweeps cost before they are run: columns, flops, and seconds on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from loclin.chain import Chain
from loclin.freeze import exact_arithmetic
from loclin.points import Point

_SIDE = 1024
_GENERIC = 1.3
"""Autograd's products against the flops of the linear path (a jvp is two vjps, less what is not asked for)."""
_BYTES_PER_SECOND = 1e10
_SECONDS_PER_LAYER = 7e-4
"""What a layer takes besides its flops: reading the weights, and the calls."""


@dataclass(frozen=True)
class Cost:
    """The price of something: columns pushed or pulled, floating-point operations, seconds, bytes held."""

    columns: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    nbytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.columns + other.columns,
            self.flops + other.flops,
            self.seconds + other.seconds,
            max(self.nbytes, other.nbytes),
        )


@cache
@exact_arithmetic()
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of one large matrix product. Cost: a few hundredths of a second, once in a process."""
    a, b = torch.ones(2, _SIDE, _SIDE, dtype=dtype, device=device)
    out = torch.empty_like(a)
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * _SIDE**3 / fastest


def products(flops: float, chain: Chain, efficiency: float = 1.0, dtype: torch.dtype | None = None) -> Cost:
    """Dense linear algebra of so many flops, at a share of the speed of one large product."""
    trace = chain.trace
    speed = rate(trace.layers[0].hidden.device, dtype or trace.dtype)
    return Cost(flops=flops, seconds=flops / (speed * efficiency))


def sweep(chain: Chain, source: Point, target: Point, columns: int) -> Cost:
    """One sweep of a block of columns between two points, forward or backward.

    With explicit products: 2 T n d_head d (H + H_kv) for O and V, 2 n T^2 d_head H for mixing, and for the MLP
    4 T n d f (its factors) or 2 T d^2 (f + n) (its matrices formed), whichever is less.
    """
    trace, flops, nbytes, layers = chain.trace, 0.0, 0, 0
    for index, below, above in chain.steps(source, target):
        explicit = chain.explicit and trace.explicit[index] and (below, above) == ("resid_pre", "resid_post")
        own, weights = _layer(chain, index, columns, explicit)
        flops, nbytes, layers = flops + own, nbytes + weights, layers + 1
    seconds = products(flops, chain).seconds + nbytes / _BYTES_PER_SECOND + layers * _SECONDS_PER_LAYER
    held = columns * trace.length * trace.width * trace.dtype.itemsize
    return Cost(columns, flops, seconds if columns else 0.0, held)


def _layer(chain: Chain, index: int, columns: int, explicit: bool) -> tuple[float, int]:
    """(flops, bytes of weights) of a layer."""
    trace, weights = chain.trace, chain.trace.anatomy.weights
    module, T, d = trace.layers[index].block.module, trace.length, trace.width
    if not explicit or weights is None:
        matrices = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
        return float(_GENERIC * 2 * columns * T * matrices), matrices * trace.dtype.itemsize
    down, o, v = (module.get_submodule(path) for path in (weights.down, weights.o, weights.v))
    assert isinstance(down, nn.Linear)
    assert isinstance(o, nn.Linear)
    assert isinstance(v, nn.Linear)
    f, inner = down.in_features, o.in_features
    values = (v.out_features - inner) // 2 if weights.fused else v.out_features
    branches = 2 if chain.hold.gate == "half" else 1
    mlp = min(2 * columns * d * f * (1 + branches), 2 * d * d * (branches * f + columns))
    numbers = d * ((1 + branches) * f + inner + values)
    attention = 2 * columns * d * (inner + values) + 2 * columns * T * inner
    return float(T * (mlp + attention)), numbers * trace.dtype.itemsize
