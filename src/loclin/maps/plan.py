"""Which method finds singular triples at the lowest cost: LAPACK or block Krylov on the dense map, or matrix-free."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch

from loclin.errors import OptionError
from loclin.maps.products import Products
from loclin.network.cost import Cost, algebra_cost, reads_layers, sweep_cost
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.spectral import check_rank, wide_dtype
from loclin.spectral.few_sweeps import SWEEPS, wide_columns
from loclin.spectral.krylov import CERTIFICATE, PROBES, TESTS, krylov_block

Method = Literal["auto", "lapack", "block_krylov", "matrix_free"]
"""`lapack`: the dense map and LAPACK; `block_krylov`: the dense map and block Krylov; `matrix_free`: no dense map."""

_LAPACK = 0.3  # the speed of a full SVD, of about 20 d^3 flops, relative to that of a large product
_THIN = 0.35  # the relative speed of products with a few columns, and of QR
_STEP = 0.12, 0.065
"""The relative speed of block Krylov on dense maps: several at a time, each with a thread of its own, and one."""
_MAP_SECONDS = 1.3e-3  # its fixed time for each map: a hundred small operations
_BOUNDS = 4.0, 2.0
"""Its bounds' flops over d_out^2 n, where k is more than `_FEW`: for each of several maps, and for one."""
_FEW = 2  # up to so many values are certified by the Frobenius norm of what the basis misses
_FIXED = PROBES + 2 * math.prod(CERTIFICATE)  # the columns of the probes and of one certificate of several maps
_STEP_SECONDS = 1e-3  # the fixed time of each matrix-free step: small decompositions
_MARGIN = 0.65, 1.0
"""Expected columns are an estimate: matrix-free is chosen if it promises at most this fraction of the dense map's time.
For each token's map, where models differ most, and for all tokens' maps side by side."""
_NORM_COLUMNS, _NORM_BLOCK = 170, 32
"""The columns that norms to 2 % take on SmolLM2 (Gemma 3 270M: 250), and how many go through the model at a time."""
_REACH = 2.0  # the dense map takes over when so many times the expected columns are spent


@dataclass(frozen=True)
class MethodCost:
    """One method, and its cost."""

    name: Method
    cost: Cost


@dataclass(frozen=True)
class Plan(Result):
    """The methods for a result, the one with the least expected time first.

    Attributes
    ----------
    task: what is to be found.
    methods: every method and its cost.
    chosen: the method that is used.
    max_columns: how many columns `matrix_free` may spend before the dense map takes over.
    provenance, warnings: which map it is for, and warnings about the prompt.
    """

    task: str
    methods: tuple[MethodCost, ...]
    chosen: Method
    max_columns: int
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per method, the fastest first."""
        names = [method.name for method in self.methods]
        fields = {"columns": "columns", "flops": "flops", "seconds": "seconds", "bytes": "nbytes"}
        costs = {title: [getattr(method.cost, field) for method in self.methods] for title, field in fields.items()}
        return {"method": names, **costs, "chosen": [name == self.chosen for name in names]}

    def __str__(self) -> str:
        rows = [f"{'method':12} {'columns':>8} {'Gflop':>9} {'seconds':>9} {'memory':>10}   {self.task}"]
        for method in self.methods:
            cost, mark = method.cost, "  <- chosen" if method.name == self.chosen else ""
            rows.append(
                f"{method.name:12} {cost.columns:8} {cost.flops / 1e9:9.1f} {cost.seconds:9.2f} "
                f"{cost.nbytes / 1e6:7.0f} MB{mark}"
            )
        return "\n".join(rows)


def plan(J: Products, k: int, *, joint: bool, tolerance: float, method: str = "auto") -> Plan:
    """The cost of each method for the k largest triples; OptionError for a method or a k that does not exist."""
    if method not in get_args(Method):
        raise OptionError(f"method={method!r}: choose one of {', '.join(get_args(Method))}")
    d_out, length, d_in = J.shape
    maps, columns = (1, length * d_in) if joint else (length, d_in)  # `maps` matrices [d_out, columns]
    check_rank(k, d_out, columns)
    expected = expected_columns(k, length, joint, min(d_out, columns))
    if joint and reads_layers(J.chain):
        matrix_free = _few_sweeps_cost(J, k, columns)
    else:
        block = krylov_block(k, maps) + (TESTS if maps == 1 else 0)
        matrix_free = _matrix_free_cost(J, expected, maps, columns, block, maps > 1)
    costs: dict[Method, Cost] = {**_dense_costs(J, maps, columns, k, joint), "matrix_free": matrix_free}
    routes = sorted((MethodCost(name, cost) for name, cost in costs.items()), key=lambda each: each.cost.seconds)
    chosen, most = cast("Method", method), int(_REACH * expected)
    room = _most_vectors(J, maps, columns)
    if method == "auto" and (not J.fits_in_budget or room < min(most, d_out)):
        # the dense map takes over, some tokens at a time
        chosen, most = "matrix_free" if 2 * room >= expected else "block_krylov", room
    elif method == "auto":
        best = next(each for each in routes if each.name != "matrix_free")
        is_wide = wide_dtype(J.dtype) == J.dtype
        pays = is_wide and J.cached_dense is None and matrix_free.seconds < _MARGIN[joint] * best.cost.seconds
        chosen = "matrix_free" if pays else best.name
    what = f"{k} largest triples of {'all tokens together' if joint else f'each of {length} tokens'} to {tolerance:g}"
    return Plan(what, tuple(routes), chosen, most)


def _dense_costs(J: Products, maps: int, columns: int, k: int, joint: bool) -> dict[Method, Cost]:
    """The cost of the methods that need the dense map, with that map's own cost if it has not been made."""
    d_out, length, d_in = J.shape
    short, wide = min(d_out, columns), wide_dtype(J.dtype)
    dense = Cost() if J.cached_dense is not None else sweep_cost(J.chain, J.source, J.target, d_out)
    copies = J.dtype.itemsize + (wide.itemsize if wide != J.dtype else 0)
    dense += Cost(nbytes=d_out * length * d_in * copies)
    lapack = algebra_cost(20.0 * maps * short * short * max(short, columns / 4), J.chain, _LAPACK)
    steps = min(short, 4 * (k + 8))
    krylov = algebra_cost(maps * 4.0 * d_out * columns * steps, J.chain, _STEP[joint])
    krylov += Cost(seconds=maps * _MAP_SECONDS)
    if k > _FEW:
        krylov += algebra_cost(maps * _BOUNDS[joint] * d_out * short * columns, J.chain)
    if steps > short / 2:  # the basis becomes too large, and LAPACK takes over
        krylov += lapack
    return {"lapack": dense + lapack, "block_krylov": dense + krylov}


def _most_vectors(J: Products, maps: int, width: int) -> int:
    """How many vectors a matrix-free basis may have within the budget; no bound on the columns if it may be whole."""
    d_out = J.shape[0]
    if J.fits(sketch_bytes(d_out, maps, width, J.dtype.itemsize)):
        return 4 * d_out
    return bisect_left(range(1, d_out), True, key=lambda n: not J.fits(sketch_bytes(n, maps, width, J.dtype.itemsize)))


def sketch_bytes(vectors: int, maps: int, width: int, itemsize: int) -> float:
    """The memory of a matrix-free basis: its rows of every map, with copies, and small float64 matrices of each map."""
    return maps * (4.0 * vectors * width * itemsize + 64.0 * vectors**2)


def expected_columns(k: int, length: int, joint: bool, short: int) -> int:
    """How many columns the matrix-free method takes on a language model's map, the probes' 8 included.

    Measured at 1e-2 and 1e-3 on SmolLM2, and on maps whose spectra decay like its own, d = 512 to 2048. For all tokens
    together, or a single one: 43 for k = 1, and four Krylov steps for k = 2 to 32 (142 for k = 8). For k = 1 and 8: 97
    and 220 for each of 2 tokens, 110 to 150 and 430 to 550 for each of 8, 220 for k = 1 and each of 64. Gemma 3 270M,
    whose spectra decay slowly, takes up to 1.9 times as many for all tokens together, for each token's 8 largest values
    twice, and for the largest four times. The tokens share one output basis, which grows with them.
    """
    if joint or length == 1:
        start, steps = krylov_block(k), 2 if k == 1 else 4
        return min(PROBES + 2 * start + (2 * steps - 1) * (start + TESTS), 2 * short)
    return int(min(_FIXED + (18 + 56 * k) * (length / 8) ** 0.5, 2 * short))


def matrix_free_is_cheaper(J: Products) -> bool:
    """Whether norms to a few percent cost less matrix-free than by the dense map and its singular values."""
    d_out, length, d_in = J.shape
    if wide_dtype(J.dtype) != J.dtype or J.cached_dense is not None or not J.fits_in_budget:
        return False
    if not J.fits(sketch_bytes(d_out, length, d_in, J.dtype.itemsize)):
        return False
    dense = sweep_cost(J.chain, J.source, J.target, d_out)
    dense += algebra_cost(4.0 * length * d_out * d_in**2, J.chain, _LAPACK)
    expected = min(_NORM_COLUMNS, 2 * min(d_out, d_in))
    return _matrix_free_cost(J, expected, length, d_in, _NORM_BLOCK).seconds < _MARGIN[False] * dense.seconds


def _few_sweeps_cost(J: Products, k: int, width: int) -> Cost:
    """Seven sweeps of wide blocks, and linear algebra on their basis (see `loclin.spectral.few_sweeps`)."""
    columns = wide_columns(k, J.shape[0])
    sweep, basis = sweep_cost(J.chain, J.source, J.target, columns // SWEEPS), columns // 2
    algebra = algebra_cost(4.0 * basis * basis * width + 12.0 * basis**3, J.chain, _THIN, torch.float64)
    nbytes = basis * width * J.dtype.itemsize
    return Cost(columns, SWEEPS * sweep.flops, SWEEPS * sweep.seconds, nbytes) + algebra


def _matrix_free_cost(J: Products, columns: int, maps: int, width: int, block: int, certifies: bool = False) -> Cost:
    """Products in blocks, half of them forward, and linear algebra on a basis of vectors of this width.

    Where it `certifies` by products, these are narrow.
    """
    narrow_columns, basis = 2 * math.prod(CERTIFICATE) if certifies else 0, columns // 2
    narrow, full = (sweep_cost(J.chain, J.source, J.target, n) for n in (CERTIFICATE[0], block))
    n_narrow, n_full = narrow_columns / CERTIFICATE[0], (columns - narrow_columns) / block
    flops = n_narrow * narrow.flops + n_full * full.flops
    seconds = n_narrow * narrow.seconds + n_full * full.seconds + (n_narrow + n_full) * _STEP_SECONDS
    algebra = algebra_cost(maps * (2.0 * basis * basis * width + 12.0 * basis**3), J.chain, _THIN, torch.float64)
    nbytes = basis * J.shape[1] * J.shape[2] * J.dtype.itemsize
    return Cost(columns, flops, seconds, nbytes) + algebra
