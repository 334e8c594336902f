"""What sweeps cost, before they are run: columns, flops, and seconds on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from loclin.common.surroundings import exact_arithmetic
from loclin.models.lease import largest_layer_bytes
from loclin.network.chain import Chain
from loclin.network.points import Point

_SIDE, _COPIED = 1024, 2**25
_GENERIC = 1.3  # flops of autograd's products, relative to those of the linear path
_BYTES_PER_SECOND = 1.5e10
DISK_BYTES_PER_SECOND = 2e9
"""Of layers on disk: a usual SSD."""
_SECONDS_PER_LAYER = 5e-4  # the time of a layer beside its flops: the calls


@dataclass(frozen=True)
class Cost:
    """Columns pushed or pulled, floating-point operations, seconds, and bytes held."""

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


given_rate: ContextVar[float | None] = ContextVar("given_rate", default=None)
"""Flops per second of another machine, for which something is planned."""


def reads_layers(chain: Chain) -> bool:
    """Whether every sweep reads the layers' weights from a disk."""
    return largest_layer_bytes(chain.trace.model.hf) > 0


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of one large matrix product. Cost: a few hundredths of a second, once in a process."""
    return given_rate.get() or _measured_rate(device, dtype)


@cache
@exact_arithmetic()
def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.ones(2, _SIDE, _SIDE, dtype=dtype, device=device)
    out = torch.empty_like(a)

    return 2 * _SIDE**3 / fastest(lambda: torch.mm(a, b, out=out), device)


def memory_rate() -> float:
    """Bytes per second that a large copy reads and writes on this processor. Cost: about a tenth of a second."""
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def fastest(work: Callable[[], object], device: torch.device | None = None) -> float:
    """The seconds of the fastest of three runs, on a GPU until it has finished."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def algebra_cost(flops: float, chain: Chain, efficiency: float = 1.0, dtype: torch.dtype | None = None) -> Cost:
    """The cost of dense linear algebra, at a fraction `efficiency` of the speed of one large product."""
    trace = chain.trace
    speed = rate(trace.layers[0].hidden.device, dtype or trace.dtype)
    return Cost(flops=flops, seconds=flops / (speed * efficiency))


def sweep_cost(chain: Chain, source: Point, target: Point, columns: int) -> Cost:
    """The cost of one sweep of a block of columns between two points, forward or backward.

    With explicit products: 2 T n d_head d (H + H_kv) for O and V, 2 n T^2 d_head H for mixing, and for the MLP
    4 T n d f (its factors) or 2 T d^2 (f + n) (its matrices formed), whichever is less. In the last layer only the
    target's position counts for all but V.
    """
    trace, steps, layers = chain.trace, chain.steps(source, target), []
    for index, below, above in steps:
        if chain.explicit and trace.explicit[index]:
            active = 1 if index == steps[-1][0] else trace.length
            layers.append(_explicit_cost(chain, index, columns, below, above, active))
        else:
            layers.append(_generic_cost(chain, index, columns))
    return _sum_layers(chain, layers, columns, columns * trace.length * trace.width)


def prefix_sweep_cost(chain: Chain, position: int, tokens: range) -> Cost:
    """The cost of one forward sweep of d columns for each of some tokens, from the embeddings through every layer.

    A token's columns are zero before it, so explicit products compute only the positions behind it, and form each
    position's MLP once for all tokens: 2 T d^2 f, and 2 d^3 + 2 d^2 d_head (H + H_kv) for each pair of tokens.
    """
    trace, d, layers = chain.trace, chain.trace.width, []
    spans = [position + 1 - i if trace.causal else trace.length for i in tokens if i <= position or not trace.causal]
    for index in range(trace.n_layers):
        if not (chain.explicit and trace.explicit[index]):
            layers.append(_generic_cost(chain, index, d * len(spans)))
            continue
        f, inner, values, branches = _sizes(chain, index)
        pairs, mixed = sum(spans), sum(span * span for span in spans)
        formed = 2 * max(spans, default=0) * d * d * branches * f
        flops = float(formed + 2 * pairs * d * d * (d + inner + values) + 2 * mixed * d * inner)
        layers.append((flops, d * ((1 + branches) * f + inner + values) * trace.dtype.itemsize))
    # On a CPU, memory that is never touched takes none.
    blocks = sum(spans) if trace.layers[0].hidden.device.type == "cpu" else len(spans) * max(spans, default=0)
    return _sum_layers(chain, layers, d * len(spans), blocks * d * d)


def _sum_layers(chain: Chain, layers: list[tuple[float, int]], columns: int, held: int) -> Cost:
    """The cost of a sweep from each layer's (flops, bytes of weights), with so many numbers held."""
    flops, nbytes = sum((own for own, _ in layers), 0.0), sum(weights for _, weights in layers)
    seconds = algebra_cost(flops, chain).seconds + nbytes / _BYTES_PER_SECOND + len(layers) * _SECONDS_PER_LAYER
    if reads_layers(chain):
        seconds += nbytes / DISK_BYTES_PER_SECOND
    return Cost(columns, flops, seconds if columns else 0.0, held * chain.trace.dtype.itemsize)


def _generic_cost(chain: Chain, index: int, columns: int) -> tuple[float, int]:
    """(flops, bytes of weights) of a layer by autograd."""
    modules = chain.trace.layers[index].block.module.modules()
    matrices = sum(part.weight.numel() for part in modules if isinstance(part, nn.Linear))
    return float(_GENERIC * 2 * columns * chain.trace.length * matrices), matrices * chain.trace.dtype.itemsize


def _explicit_cost(chain: Chain, index: int, columns: int, below: str, above: str, active: int) -> tuple[float, int]:
    """(flops, bytes of weights) between two points of an explicit layer, of which `active` positions matter."""
    trace, d = chain.trace, chain.trace.width
    f, inner, values, branches = _sizes(chain, index)
    flops, numbers = 0, 0
    if below == "resid_pre":
        flops += 2 * columns * (d * (active * inner + trace.length * values) + active * trace.length * inner)
        numbers += d * (inner + values)
    if above in ("mlp_out", "resid_post"):
        flops += active * min(2 * columns * d * f * (1 + branches), 2 * d * d * (branches * f + columns))
        numbers += d * (1 + branches) * f
    return float(flops), numbers * trace.dtype.itemsize


def _sizes(chain: Chain, index: int) -> tuple[int, int, int, int]:
    """(f, H d_head, H_kv d_head, how many branches of the MLP are live) of an explicit layer."""
    weights, module = chain.trace.anatomy.weights, chain.trace.layers[index].block.module
    assert weights is not None
    down, o, v = (module.get_submodule(path) for path in (weights.down, weights.o, weights.v))
    assert isinstance(down, nn.Linear)
    assert isinstance(o, nn.Linear)
    assert isinstance(v, nn.Linear)
    values = (v.out_features - o.in_features) // 2 if weights.fused else v.out_features
    return down.in_features, o.in_features, values, 2 if chain.options.gate == "half" else 1
