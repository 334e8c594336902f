"""How cost grows: the dense map and `svd(k=8, joint=True, method="matrix_free")` against width, length and depth.

Random models (see `bench/models.py`), each quantity varied alone. An exponent is the slope of a least-squares line
through the logarithms of the seconds. With T tokens a column costs T times one token's products and attention T^2, so
seconds must not grow faster than T^2, nor seconds per token faster than T.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from harness import Row, arguments, interleaved, report, show
from loclin.linearization import Linearization
from models import decaying, fresh

_WIDTH, _LAYERS, _LENGTH = 512, 2, 8
_STEEPEST = 2.0
_UNITS = {"d": "width d", "T": "length T", "L": "depth L"}


def dense(lin: Linearization) -> int:
    return len(fresh(lin).dense())


def krylov(lin: Linearization) -> int:
    """The columns that it took."""
    J = fresh(lin)
    J.svd(k=8, joint=True, method="matrix_free")
    return J.columns


ROUTES = {"dense J": dense, "svd(k=8, joint, krylov)": krylov}


def measure(what: str, sizes: list[int], repeats: int) -> tuple[list[Row], list[Row]]:
    """(exponents, seconds) against one quantity."""
    seconds: dict[str, list[float]] = {route: [] for route in ROUTES}
    lines, details = [], []
    for size in sizes:
        given = {"d": _WIDTH, "L": _LAYERS, "T": _LENGTH} | {what: size}
        label = f"d={given['d']} L={given['L']} T={given['T']}"
        lin = decaying(given["d"], given["L"], given["T"])
        runs = interleaved({route: partial(work, lin) for route, work in ROUTES.items()}, repeats, label, patience=15)
        lines.append([label])
        for route, run in runs.items():
            seconds[route].append(run.seconds)
            lines[-1] += [f"{run.seconds:.3f}", str(run.found)]
            details.append(Row(f"{label}: {route}, {run.found} columns", run.seconds, "s"))
    show(
        f"seconds against {_UNITS[what]}", ["model", *(part for route in ROUTES for part in (route, "columns"))], lines
    )
    span = f"{what} = {sizes[0]} to {sizes[-1]}"
    demand = _STEEPEST if what == "T" else None
    return [
        Row(f"{route}: exponent of seconds in {what}", exponent(sizes, times), span, demand=demand)
        for route, times in seconds.items()
    ], details


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log(times) over log(sizes)."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def main() -> None:
    options = arguments(__doc__ or "")
    sizes = {"d": [256, 512, 1024, 2048], "T": [8, 32, 128, 512], "L": [2, 4, 8]}
    if options.quick:
        sizes = {"d": [256, 512, 1024], "T": [8, 32, 128], "L": [2, 4]}
    rows, details = [], []
    for what, values in sizes.items():
        exponents, seconds = measure(what, values, repeats=2 if options.quick else 5)
        rows, details = rows + exponents, details + seconds
    report("scaling", rows, options.check, details)


if __name__ == "__main__":
    main()
