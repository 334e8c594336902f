"""The dense map embed -> final of a real model: ours against PyTorch's own Jacobians and the matmul limit.

PyTorch's functions get the same frozen forward pass as one graph. Times are the best of several interleaved runs, so
that a busy machine slows all of them alike; the matmul limit is 2 d T P flops (P: V, O, up and down weights) at the
rate of one large float32 product, measured between the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from harness import Row, arguments, extra_peak_bytes, in_new_process, matmul_rate, report, timed
from loclin.linearization import Linearization
from models import BUDGET, fresh, linear_weights, packaged, whole_graph


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
        demand = 1.3 if route == "loclin" else None
        rows.append(Row(f"{label}: {route}", seconds, "s", "matmul limit", seconds / limit, demand))
        if route != "loclin":
            rows.append(Row(f"{label}: loclin", best["loclin"], "s", route, best["loclin"] / seconds))
            error = ((routes[route]() - reference).norm() / reference.norm()).item()
            rows.append(Row(f"{label}: difference from {route}", error, "relative", demand=1e-5))
    allowed = reference.nbytes + BUDGET
    for route in routes:
        peak = float(in_new_process(__file__, "--peak-of", name, route))
        demand = 1.0 if route == "loclin" else None
        rows.append(Row(f"{label}: {route}, extra peak memory", peak / 1e6, "MB", "J + budget", peak / allowed, demand))
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--peak-of"]:
        name, route = sys.argv[2:]
        lin = packaged(name)
        print(extra_peak_bytes(routes_of(lin)[route]))
        return
    options = arguments(__doc__ or "")
    names = ["smollm2-135m"] if options.quick else ["smollm2-135m", "gemma-3-270m"]
    rows = [row for name in names for row in measure(name, repeats=3 if options.quick else 7)]
    report("dense", rows, options.check)


if __name__ == "__main__":
    main()
