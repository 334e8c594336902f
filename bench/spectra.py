"""Spectra of a network's token maps: ours by every route against other packages', each from nothing, in one run.

Real models: the k = 8 largest values of every token's map and of the joint map, by our routes, by the paper's
(PyTorch's dense Jacobian, then scikit-learn's `randomized_svd`), by `randomized_svd` and `torch.svd_lowrank` on our
dense map, by SciPy's `svds` on our products, and by matfree on our dense map where it is installed. Errors are the
largest of any value against the float64 SVD of the dense map. Then: the joint map's triples, norms to 2 %, and a wide
random model's spectra, all against the dense map alone; the planner against the best single route; and 512 tokens
against the matmul limit of the columns.

Times are the best of several interleaved runs; peaks are measured in processes of their own (not with --quick).
`--parts` runs some of it.
Needs the extra `bench`: pip install -c constraints.txt -e ".[bench]"
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import planner
from harness import (
    Row,
    Timed,
    arguments,
    extra_peak_bytes,
    in_new_process,
    interleaved,
    report,
    say,
    show,
)
from loclin.linearization import Linearization
from loclin.spectral import stable_rank_and_norm
from models import SMOLLM2_SPECTRUM, decaying, fresh, packaged
from rivals import AUTO, DENSE, HYBRID, PAPER, TOLERANCE, K, Outcome, ours, routes_of, truth

NORM_TOLERANCE = 0.02
PARTS = ("routes", "peaks", "norms", "wide", "planner", "long")


def main() -> None:
    if sys.argv[1:2] == ["--peak-of"]:
        name, scope, route = sys.argv[2:]
        work = routes_of(packaged(name), joint=scope == "joint")[route]
        print(extra_peak_bytes(work))
        return
    options = arguments(__doc__ or "", PARTS)
    if not (find_spec("matfree") and find_spec("jax")):
        print("matfree is not installed and is left out (pip install matfree jax)")
    rows, details = [], []
    repeats = 2 if options.quick else 3
    for name in ["smollm2-135m"] if options.quick else ["smollm2-135m", "gemma-3-270m"]:
        lin = packaged(name)
        peak = not options.quick and "peaks" in options.parts
        for joint in (False, True) if "routes" in options.parts else ():
            add(rows, details, side_by_side(name, lin, joint, repeats, peak))
        if "norms" in options.parts:
            rows += norms(name, lin, repeats)
    if "wide" in options.parts:
        rows += wide(*((512, 2) if options.quick else (2048, 4)))
    if "planner" in options.parts:
        add(rows, details, planner.measure(options.quick))
    if "long" in options.parts and not options.quick:
        rows += long_prompt()
    report("spectra", rows, options.check, details, partly=set(options.parts) != set(PARTS))


def add(rows: list[Row], details: list[Row], found: tuple[Iterable[Row], Iterable[Row]]) -> None:
    rows += found[0]
    details += found[1]


def side_by_side(name: str, lin: Linearization, joint: bool, repeats: int, peak: bool) -> tuple[list[Row], list[Row]]:
    """(what is demanded, everything); prints the table of everything."""
    scope = "joint" if joint else "every token"
    label = f"{name}, {lin.trace.length} tokens, {scope}"
    true = truth(fresh(lin).dense(), joint)
    runs = interleaved(routes_of(lin, joint), repeats, label)
    peaks = {route: peak_in_new_process(name, scope, route) if peak else math.nan for route in runs}
    errors = {route: run.found.error(true) for route, run in runs.items()}
    lines = [
        [route, f"{run.seconds:.2f}", f"{run.seconds / runs[PAPER].seconds:.2f}", megabytes(peaks[route])]
        + [str(run.found.columns), number(errors[route]), number(run.found.certified), run.found.method]
        for route, run in runs.items()
    ]
    header = ["route", "seconds", "ratio to paper's", "extra peak MB", "columns", "true error", "certified", "taken"]
    show(f"{label}, k={K}", header, lines)
    details = [row for route in runs for row in _details(f"{label}: {route}", runs, route, peaks, errors)]
    return _demanded(label, runs, errors, 1.05 if name == "smollm2-135m" and not joint else None), details


def megabytes(peak: float) -> str:
    return "" if math.isnan(peak) else f"{peak / 1e6:.0f}"


def number(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.1e}"


def _details(
    label: str, runs: dict[str, Timed[Outcome]], route: str, peaks: dict[str, float], errors: dict[str, float]
) -> list[Row]:
    run = runs[route]
    rows = [
        Row(label, run.seconds, "s", PAPER, run.seconds / runs[PAPER].seconds),
        Row(f"{label}, extra peak memory", peaks[route] / 1e6, "MB", PAPER, peaks[route] / peaks[PAPER]),
        Row(f"{label}, columns", run.found.columns, "columns"),
        Row(f"{label}, true error", errors[route], "relative"),
        Row(f"{label}, certified error", run.found.certified, "relative"),
    ]
    return [row for row in rows if not math.isnan(row.value)]


def _demanded(label: str, runs: dict[str, Timed[Outcome]], errors: dict[str, float], demand: float | None) -> list[Row]:
    mine = runs[AUTO]
    rows = [
        Row(
            f"{label}: {AUTO} ({mine.found.method})",
            mine.seconds,
            "s",
            rival,
            mine.seconds / runs[rival].seconds,
            demand,
        )
        for rival in (PAPER, HYBRID)
    ]
    rows.append(Row(f"{label}: {AUTO}, certified error", mine.found.certified, "relative", demand=TOLERANCE))
    rows.append(Row(f"{label}: {AUTO}, true error", errors[AUTO], "relative", demand=TOLERANCE))
    return [*rows, Row(f"{label}: {PAPER}, true error", errors[PAPER], "relative")]


def peak_in_new_process(name: str, scope: str, route: str) -> float:
    say(f"{name}, {scope}: peak memory of {route}")
    return float(in_new_process(__file__, "--peak-of", name, scope, route))


def norms(name: str, lin: Linearization, repeats: int) -> list[Row]:
    """The joint map's triples, and sigma_1 and the stable rank of every token to 2 %, against dense J alone; errors."""
    label = f"{name}, {lin.trace.length} tokens, norms to {NORM_TOLERANCE:.0%}"
    values = truth(fresh(lin).dense(), joint=False)
    exact = {"sigma_1": values[:, 0], "stable rank": values.square().sum(dim=1) / values[:, 0].square()}
    joint = f"J.svd(k={K}, joint=True)"
    routes: dict[str, Callable[[], Any]] = {
        DENSE: lambda: fresh(lin).dense(),
        joint: lambda: fresh(lin).svd(K, joint=True),
        "J.norms": lambda: fresh(lin).norms(tolerance=NORM_TOLERANCE),
        "products alone, certified": lambda: stable_rank_and_norm(fresh(lin), tolerance=NORM_TOLERANCE),
    }
    runs = interleaved(routes, repeats, label)
    limit, triples = runs.pop(DENSE).seconds, runs.pop(joint)
    is_demanded = name == "smollm2-135m"
    against = (DENSE, triples.seconds / limit, 0.45 if is_demanded else None)
    rows = [
        Row(f"{label}: {DENSE}", limit, "s"),
        Row(f"{name}, {lin.trace.length} tokens: {joint}", triples.seconds, "s", *against),
        Row(f"{name}, {lin.trace.length} tokens: {joint}, columns", triples.found.columns, "columns"),
    ]
    for route, run in runs.items():
        demand = 0.5 if is_demanded and route == "J.norms" else None
        rows.append(Row(f"{label}: {route}", run.seconds, "s", DENSE, run.seconds / limit, demand))
        rows.append(Row(f"{label}: {route}, columns", run.found.columns, "columns"))
        for what, found in (("sigma_1", run.found.largest), ("stable rank", run.found.stable_rank)):
            off = (found.double() / exact[what] - 1).abs().max().item()
            rows.append(Row(f"{label}: {route}, true error of {what}", off, "relative", demand=NORM_TOLERANCE))
    return rows


def wide(d: int, layers: int, length: int = 8) -> list[Row]:
    """A wide random model with spectra like SmolLM2's: what svd costs against the dense map alone."""
    label = f"random Llama, d={d}, {layers} layers, {length} tokens"
    say(f"{label}: making it")
    lin = decaying(d, layers, length)
    kept: list[Tensor] = []

    def dense() -> Outcome:
        kept[:] = [fresh(lin).dense()]
        return Outcome(torch.empty(1, 0), d)

    routes = {
        "dense": dense,
        "joint": partial(ours, lin, True, "auto"),
        "every token": partial(ours, lin, False, "auto"),
    }
    runs = interleaved(routes, 3, label, patience=120)
    limit = runs["dense"].seconds
    rows = [Row(f"{label}: {DENSE}", limit, "s")]
    spectra = {}
    demands = {"joint": 0.25, "every token": 0.6} if d >= 2048 else {}  # narrower, and the dense map is right
    for scope in ("joint", "every token"):
        run, name = runs[scope], f"{label}, {scope}: svd(k={K})"
        say(f"{label}, {scope}: float64 SVD to compare with")
        spectra[scope] = truth(kept[0], joint=scope == "joint")
        rows += [
            Row(f"{name}, auto ({run.found.method})", run.seconds, "s", DENSE, run.seconds / limit, demands.get(scope)),
            Row(f"{name}, columns", run.found.columns, "columns", f"d = {d}", run.found.columns / d),
            Row(f"{name}, certified error", run.found.certified, "relative", demand=TOLERANCE),
            Row(f"{name}, true error", run.found.error(spectra[scope]), "relative", demand=TOLERANCE),
        ]
    _show_spectra(label, spectra["every token"][-1], spectra["joint"][0])
    return rows


def _show_spectra(label: str, token: Tensor, joint: Tensor) -> None:
    """How far the random model's spectra decay like SmolLM2's."""
    dense = fresh(packaged("smollm2-135m")).dense()
    mine, all_mine = truth(dense, joint=False)[-1], truth(dense, joint=True)[0]
    named = {
        "SmolLM2, last token": mine,
        f"{label}, last token": token,
        "SmolLM2, joint": all_mine,
        f"{label}, joint": joint,
    }
    ranks = [j for j in (1, 8, 64, 256) if j in SMOLLM2_SPECTRUM]
    lines = [[name, *(f"{(S[j - 1] / S[0]).item():.2g}" for j in ranks)] for name, S in named.items()]
    show("sigma_j / sigma_1", ["map", *(f"j={j}" for j in ranks)], lines)


def long_prompt() -> list[Row]:
    """512 tokens, in a process of its own."""
    say("512 tokens: a few minutes")
    found = json.loads(in_new_process(str(Path(__file__).parent / "spectra_long.py")))
    label = "smollm2-135m, 512 tokens, top vector and stable rank of every token"
    seconds, limit = found["seconds"], found["limit"]
    against = f"matmul limit of {found['planned']} columns at {found['rate'] / 1e9:.0f} Gflop/s"
    return [
        Row(f"{label} ({found['route']})", seconds, "s", against, seconds / limit, 1.3),
        Row(f"{label}: columns spent", found["columns"], "columns", "planned", found["columns"] / found["planned"]),
        Row(f"{label}: resident peak", found["peak"] / 1e9, "GB", demand=8.0),
        Row(f"{label}: certificate passed", found["passed"], "1 = yes"),
        Row(f"{label}: reconstruction error", found["reconstruction_error"], "relative"),
    ]


if __name__ == "__main__":
    main()
