"""Which way to a spectrum is the cheapest: dense and LAPACK, dense and block Krylov, or products alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from loclin.chain import Chain
from loclin.cost import Cost, products, sweep
from loclin.errors import OptionError
from loclin.points import Point

Way = Literal["auto", "full", "top", "krylov"]
"""`full`: the dense map and LAPACK; `top`: the dense map and block Krylov; `krylov`: no dense map."""

_LAPACK = 0.12
"""The speed of a full SVD, of about 20 d^3 flops, against that of a large product."""
_THIN = 0.35
"""The speed of products with a few columns, and of QR."""
_MARGIN = 0.8
"""Counted columns are an estimate: products alone are taken when they promise this share of the dense map's time."""
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
        For a way that does not exist.
    """
    if way not in get_args(Way):
        raise OptionError(f"plan={way!r}: choose one of {', '.join(get_args(Way))}")
    d_out, length, d_in = J.shape
    maps, rows = (1, length * d_in) if joint else (length, d_in)
    short = min(d_out, rows)
    dense = Cost() if J.known is not None else sweep(J.chain, J.source, J.target, d_out)
    held = Cost(nbytes=d_out * length * d_in * J.dtype.itemsize)
    steps = min(short, 4 * (k + 8))
    full = dense + held + products(20.0 * maps * short * short * max(short, rows / 4), J.chain, _LAPACK)
    top = dense + held + products(maps * (4.0 * d_out * rows * steps + 4.0 * short**3), J.chain, _THIN)
    expected = expected_columns(k, length, joint, short)
    alone = _alone(J, expected, maps, rows, k)
    ways: tuple[tuple[Way, Cost], ...] = (("full", full), ("top", top), ("krylov", alone))
    routes = sorted((Route(name, cost) for name, cost in ways), key=lambda route: route.cost.seconds)
    chosen = cast("Way", way)
    if way == "auto":
        best = min((route for route in routes if route.name != "krylov"), key=lambda route: route.cost.seconds)
        certain = J.known is None and alone.seconds < _MARGIN * best.cost.seconds
        chosen = "krylov" if certain else best.name
    what = f"{k} largest triples of {'all tokens together' if joint else f'each of {length} tokens'} to {tolerance:g}"
    return Plan(what, tuple(routes), chosen, int(_REACH * expected))


def expected_columns(k: int, length: int, joint: bool, short: int) -> int:
    """How many columns the products-only way takes on a language model's map; measured, the certificate's 48 included.

    On SmolLM2 and Gemma 3 270M at 8 tokens and k = 8: 190 to 220 for all tokens together, 490 to 820 for every token.
    The tokens share one output basis, which grows with their number as long as the space has room.
    """
    if joint:
        return min(48 + 20 * (k + 1), 2 * short)
    tokens = 1 + 0.3 * max(length - 1, 0) ** 0.5
    return int(min(48 + 40 * (k + 1) * tokens, 2 * short))


def cheaper_alone(J: Map) -> bool:
    """Whether norms to a few percent cost less by products alone than by the dense map and its singular values."""
    if J.known is not None:
        return False
    d_out, length, d_in = J.shape
    dense = sweep(J.chain, J.source, J.target, d_out) + products(4.0 * length * d_out * d_in**2, J.chain, _LAPACK)
    expected = min(_NORM_COLUMNS, 2 * min(d_out, d_in))
    return _alone(J, expected, length, d_in, 8).seconds < _MARGIN * dense.seconds


def _alone(J: Map, columns: int, maps: int, rows: int, k: int) -> Cost:
    """Products in blocks of k + 8, half of them forward, and the linear algebra on the basis."""
    block = k + 8
    one = sweep(J.chain, J.source, J.target, block)
    sweeps = columns / block
    basis = columns // 2
    algebra = products(maps * (2.0 * basis * basis * rows + 12.0 * basis**3), J.chain, _THIN, torch.float64)
    nbytes = basis * J.shape[1] * J.shape[2] * J.dtype.itemsize
    return Cost(columns, sweeps * one.flops, sweeps * one.seconds, nbytes) + algebra
