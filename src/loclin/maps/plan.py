"""Which way to a spectrum is the cheapest: dense and LAPACK, dense and block Krylov, or products alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.network.chain import Chain
from loclin.network.cost import Cost, products, sweep
from loclin.network.points import Point
from loclin.spectral import check_rank, wide
from loclin.spectral.krylov import CERTIFICATE, PROBES

Way = Literal["auto", "full", "top", "krylov"]
"""`full`: the dense map and LAPACK; `top`: the dense map and block Krylov; `krylov`: no dense map."""

_LAPACK = 0.3
"""The speed of a full SVD, of about 20 d^3 flops, against that of a large product."""
_THIN = 0.35
"""The speed of products with a few columns, and of QR."""
_STEP = 0.12, 0.065
"""That of a block Krylov method on dense maps: on several at a time, each with a thread of its own, and on one."""
_MAP_SECONDS = 1.3e-3
"""What it takes besides for each map: a hundred small operations."""
_BOUNDS = 4.0, 2.0
"""Its bounds' flops over d_out^2 n, where k is more than a few: for each of several maps, and for one."""
_FEW = 2
"""Up to so many values are certified by the Frobenius norm of what the basis misses."""
_NARROW = CERTIFICATE[0]
_FIXED = PROBES + 2 * math.prod(CERTIFICATE)
"""The columns of the probes and of one certificate, and how many of them go through the model at a time."""
_STEP_SECONDS = 1e-3
"""What products alone take besides for each step: small decompositions of what is known."""
_MARGIN = 0.65, 1.0
"""Counted columns are an estimate: products alone are taken when they promise this share of the dense map's time; of
each token's map, where models differ most, and of all together."""
_NORM_COLUMNS = 250
"""What norms to 2 % have taken on SmolLM2; up to twice as many on Gemma 3 270M."""
_REACH = 1.6
"""How many of the expected columns are spent before the dense map takes over."""


@runtime_checkable
class Map(Protocol):
    """What a plan needs to know of a map."""

    chain: Chain
    source: Point
    target: Point

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""

    @property
    def known(self) -> Tensor | None:
        """The dense map, where it has been made."""

    @property
    def fits(self) -> bool:
        """Whether the dense map is within the memory budget."""


@dataclass(frozen=True)
class Route:
    """One way to the result, and its price."""

    name: Way
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """The ways to a result, cheapest by counted time first.

    Attributes
    ----------
    task
        What is asked for.
    routes
        Every way, the cheapest first.
    chosen
        The way that is taken.
    max_columns
        How many columns `krylov` may spend before the dense map takes over.
    """

    task: str
    routes: tuple[Route, ...]
    chosen: Way
    max_columns: int

    __repr__ = brief

    def __str__(self) -> str:
        rows = [f"{'route':8} {'columns':>8} {'Gflop':>9} {'seconds':>9} {'holds':>10}   {self.task}"]
        for route in self.routes:
            cost, mark = route.cost, "  <- chosen" if route.name == self.chosen else ""
            rows.append(
                f"{route.name:8} {cost.columns:8} {cost.flops / 1e9:9.1f} {cost.seconds:9.2f} "
                f"{cost.nbytes / 1e6:7.0f} MB{mark}"
            )
        return "\n".join(rows)


def plan(J: Map, k: int, *, joint: bool, tolerance: float, way: str = "auto") -> Plan:
    """Count what each way to the k largest triples costs. Nothing is run but one matrix product, once in a process.

    Raises
    ------
    OptionError
        For a way that does not exist, or a k that the map does not have.
    """
    if way not in get_args(Way):
        raise OptionError(f"plan={way!r}: choose one of {', '.join(get_args(Way))}")
    d_out, length, d_in = J.shape
    maps, rows = (1, length * d_in) if joint else (length, d_in)
    check_rank(k, d_out, rows)
    short = min(d_out, rows)
    dense = Cost() if J.known is not None else sweep(J.chain, J.source, J.target, d_out)
    held = Cost(nbytes=d_out * length * d_in * (J.dtype.itemsize + (wide(J.dtype) != J.dtype) * wide(J.dtype).itemsize))
    steps = min(short, 4 * (k + 8))
    lapack = products(20.0 * maps * short * short * max(short, rows / 4), J.chain, _LAPACK)
    krylov = products(maps * 4.0 * d_out * rows * steps, J.chain, _STEP[joint]) + Cost(seconds=maps * _MAP_SECONDS)
    if k > _FEW:
        krylov += products(maps * _BOUNDS[joint] * d_out * short * rows, J.chain)
    full = dense + held + lapack
    top = dense + held + krylov + (lapack if steps > short / 2 else Cost())  # it then ends there all the same
    expected = expected_columns(k, length, joint, short)
    alone = _alone(J, expected, maps, rows, k)
    ways: tuple[tuple[Way, Cost], ...] = (("full", full), ("top", top), ("krylov", alone))
    routes = sorted((Route(name, cost) for name, cost in ways), key=lambda route: route.cost.seconds)
    chosen, most = cast("Way", way), int(_REACH * expected)
    if way == "auto" and not J.fits:
        chosen, most = "krylov", 4 * d_out
    elif way == "auto":
        best = min((route for route in routes if route.name != "krylov"), key=lambda route: route.cost.seconds)
        certain = wide(J.dtype) == J.dtype and J.known is None and alone.seconds < _MARGIN[joint] * best.cost.seconds
        chosen = "krylov" if certain else best.name
    what = f"{k} largest triples of {'all tokens together' if joint else f'each of {length} tokens'} to {tolerance:g}"
    return Plan(what, tuple(routes), chosen, most)


def expected_columns(k: int, length: int, joint: bool, short: int) -> int:
    """How many columns the products-only way takes on a language model's map, the certificate's 48 included.

    Measured at 1e-2 and 1e-3 on SmolLM2, and on models of random weights whose spectra decay like its own, d = 512 to
    2048: for k = 1 and 8, 93 and 160 (2 tokens) to 190 for all tokens together; 97 and 220 for each of 2, 110 to 150
    and 430 to 550 for each of 8, 220 for k = 1 and each of 64. Gemma 3 270M, whose spectra decay slowly, takes up to
    twice as many for k = 8, and for each token's largest value four times. The tokens share one output basis, which
    grows with them.
    """
    if joint:
        return min(_FIXED + 30 + (8 + min(length, 6)) * k, 2 * short)
    return int(min(_FIXED + (18 + 56 * k) * (length / 8) ** 0.5, 2 * short))


def cheaper_alone(J: Map) -> bool:
    """Whether norms to a few percent cost less by products alone than by the dense map and its singular values."""
    if wide(J.dtype) != J.dtype and J.fits:
        return False
    if J.known is not None or not J.fits:
        return J.known is None
    d_out, length, d_in = J.shape
    dense = sweep(J.chain, J.source, J.target, d_out) + products(4.0 * length * d_out * d_in**2, J.chain, _LAPACK)
    expected = min(_NORM_COLUMNS, 2 * min(d_out, d_in))
    return _alone(J, expected, length, d_in, 8).seconds < _MARGIN[False] * dense.seconds


def _alone(J: Map, columns: int, maps: int, rows: int, k: int) -> Cost:
    """Products in blocks of k + 8, half of them forward, and the linear algebra on the basis."""
    block, basis = k + 8, columns // 2
    narrow, one = (sweep(J.chain, J.source, J.target, n) for n in (_NARROW, block))
    few, many = _FIXED / _NARROW, (columns - _FIXED) / block
    flops, seconds = (few * a + many * b for a, b in ((narrow.flops, one.flops), (narrow.seconds, one.seconds)))
    algebra = products(maps * (2.0 * basis * basis * rows + 12.0 * basis**3), J.chain, _THIN, torch.float64)
    nbytes = basis * J.shape[1] * J.shape[2] * J.dtype.itemsize
    return Cost(columns, flops, seconds + (few + many) * _STEP_SECONDS, nbytes) + algebra
