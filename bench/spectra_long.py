"""SmolLM2 at 512 tokens: the top singular vector and the stable rank of every token, in a process of its own.

The columns are those that `J.plan` counts for the vectors, and those that the stable ranks then spend on the same map.
Prints what it found as JSON, for `bench/spectra.py`, which sets the seconds against the matmul limit of the columns.
"""

from __future__ import annotations

import json

import loclin
from harness import matmul_rate, resident_peak_bytes, say, timed
from models import PARAGRAPH, fresh, linear_weights

LENGTH = 512


def main() -> None:
    model = loclin.load("smollm2-135m")
    ids = model.encode(PARAGRAPH * 8, bos=True)[:, :LENGTH]
    lin = loclin.linearize(model, ids)
    J = fresh(lin, budget=None)
    plan = J.plan(k=1)
    chosen = next(route for route in plan.methods if route.name == plan.chosen)
    say(f"{LENGTH} tokens; the plan:\n{plan}")
    rates = [matmul_rate()]
    seconds = timed(lambda: J.svd(k=1))
    say(f"{LENGTH} tokens: svd(k=1) of every token: {seconds:.0f} s, {J.columns} columns")
    spent = J.columns
    seconds += timed(lambda: J.stable_rank(tolerance=0.02))
    peak = resident_peak_bytes()
    rates.append(matmul_rate())
    columns = chosen.cost.columns + J.columns - spent
    flops = 2 * columns * LENGTH * linear_weights(model.hf)
    say(f"{LENGTH} tokens: and the stable ranks: {seconds:.0f} s, {J.columns} columns; now the certificate")
    certificate = lin.certify()
    found = {
        "seconds": seconds,
        "limit": flops / max(rates),
        "rate": max(rates),
        "route": chosen.name,
        "planned": columns,
        "columns": J.columns,
        "peak": peak,
        "passed": float(certificate.passed),
        "reconstruction_error": certificate.reconstruction_error,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
