"""The dense map embed -> final of a real model: ours against PyTorch's own Jacobians and the matmul limit.

PyTorch's functions get the same frozen forward pass as one graph. Times are the best of several interleaved runs, so
that a busy machine slows all of them alike; the matmul limit is 2 d T P flops (P: V, O, up and down weights) at the
rate of one large float32 product, measured between the runs. Explicit products may stay below it, as they form
position-wise matrices first. The coefficients that they are made of are read by `linearize`, whose time stands beside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import loclin
from harness import Row, arguments, extra_peak_bytes, in_new_process, matmul_rate, report, timed
from loclin.linearization import Linearization
from loclin.maps.linear_map import LinearMap
from loclin.network.chain import Chain
from models import BUDGET, PARAGRAPH, fresh, linear_weights, packaged, whole_graph

DEMAND, DEMAND_LONG, LONG = 0.75, 0.9, 128


def routes_of(lin: Linearization) -> dict[str, Callable[[], Tensor]]:
    x, forward = lin.embeddings, whole_graph(lin)
    return {
        "loclin": lambda: fresh(lin).dense(),
        "torch.func.jacrev(chunk_size=128)": lambda: torch.func.jacrev(forward, chunk_size=128)(x),
        "autograd.functional.jacobian(vectorize=True)": lambda: torch.autograd.functional.jacobian(
            forward, x, vectorize=True
        ),
    }


def measure(name: str, repeats: int) -> list[Row]:
    lin = packaged(name)
    length, width = lin.embeddings.shape
    flops = 2 * width * length * linear_weights(lin.model.hf)
    routes = routes_of(lin)
    reference = fresh(lin).dense()
    times: dict[str, list[float]] = {route: [] for route in routes}
    rates = [matmul_rate()]
    for run in range(repeats):
        for route, work in routes.items():
            if route == "loclin" or run < 2:
                times[route].append(timed(work))
                rates.append(matmul_rate())
    limit = flops / max(rates)
    best = {route: min(seconds) for route, seconds in times.items()}
    label = f"{name}, {length} tokens"
    rows = [Row(f"{label}: matmul limit at {max(rates) / 1e9:.0f} Gflop/s", limit, "s")]
    for route, seconds in best.items():
        demand = DEMAND if route == "loclin" else None
        rows.append(Row(f"{label}: {route}", seconds, "s", "matmul limit", seconds / limit, demand))
        if route != "loclin":
            rows.append(Row(f"{label}: loclin", best["loclin"], "s", route, best["loclin"] / seconds))
            error = ((routes[route]() - reference).norm() / reference.norm()).item()
            rows.append(Row(f"{label}: difference from {route}", error, "relative", demand=1e-5))
    J = lin.jacobian()
    generic = LinearMap(Chain(lin.trace, explicit=False), J.source, J.target, J.position, budget=BUDGET).dense()
    error = ((generic - reference).norm() / reference.norm()).item()
    rows.append(Row(f"{label}: difference from generic links", error, "relative", demand=1e-6))
    again = min(timed(lambda: loclin.linearize(lin.model, lin.input_ids)) for _ in range(3))
    rows.append(Row(f"{label}: linearize, coefficients included", again, "s", "dense J", again / best["loclin"]))
    allowed = reference.nbytes + BUDGET
    for route in routes:
        peak = float(in_new_process(__file__, "--peak-of", name, route))
        demand = 1.0 if route == "loclin" else None
        rows.append(Row(f"{label}: {route}, extra peak memory", peak / 1e6, "MB", "J + budget", peak / allowed, demand))
    return rows


def longer(name: str) -> list[Row]:
    """The same at `LONG` tokens: ours alone, once."""
    model = loclin.load(name)
    lin = loclin.linearize(model, model.encode(PARAGRAPH, bos=True)[:, :LONG], memory=BUDGET)
    before = matmul_rate()
    seconds = timed(lambda: fresh(lin).dense())
    rate = max(before, matmul_rate())
    limit = 2 * lin.trace.width * LONG * linear_weights(model.hf) / rate
    label = f"{name}, {LONG} tokens: loclin"
    return [Row(label, seconds, "s", f"matmul limit at {rate / 1e9:.0f} Gflop/s", seconds / limit, DEMAND_LONG)]


def main() -> None:
    if sys.argv[1:2] == ["--peak-of"]:
        name, route = sys.argv[2:]
        lin = packaged(name)
        print(extra_peak_bytes(routes_of(lin)[route]))
        return
    options = arguments(__doc__ or "")
    names = ["smollm2-135m"] if options.quick else ["smollm2-135m", "gemma-3-270m"]
    rows = [row for name in names for row in measure(name, repeats=3 if options.quick else 7)]
    rows += [] if options.quick else [row for name in names for row in longer(name)]
    report("dense", rows, options.check)


if __name__ == "__main__":
    main()
