"""SmolLM2 at 512 tokens: the top singular vector and the stable rank of every token, in a process of its own.

With `--tokens 4096`, instead: what a long prompt costs beside the model's own forward pass, with its demands.

The columns are those that `J.plan` counts for the vectors, and those that the stable ranks then spend on the same map.
Prints what it found as JSON, for `bench/spectra.py`, which sets the seconds against the matmul limit of the columns.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

import loclin
from harness import Row, matmul_rate, report, resident_peak_bytes, say, timed
from models import PARAGRAPH, fresh, linear_weights

LENGTH = 512


def measure_beside_forward(length: int) -> list[Row]:
    """`linearize` and two attributions of a long prompt, in forward passes of the model, and the memory of it all."""
    model = loclin.load("smollm2-135m")
    ids = model.encode(PARAGRAPH * math.ceil(length / 128), bos=True)[:, :length]
    made: list[loclin.Linearization] = []
    works = {
        "linearize": (3.0, lambda: made.append(loclin.linearize(model, ids))),
        "shares by token": (2.0, lambda: made[0].attribute(by="token", progress=False)),
        "shares by layer": (2.0, lambda: made[0].attribute(by="layer", in_words=0, progress=False)),
    }
    with torch.no_grad():
        forward = min(timed(lambda: model.hf(ids, use_cache=False, logits_to_keep=1)) for _ in range(2))
    label, rows = f"smollm2-135m, {length} tokens", [Row(f"{length} tokens: forward pass", forward, "s")]
    for name, (demand, work) in works.items():
        seconds = timed(work)
        say(f"{label}: {name}: {seconds:.1f} s, {seconds / forward:.2f} forward passes")
        rows.append(Row(f"{label}: {name}", seconds, "s", "the model's forward pass", seconds / forward, demand))
    return [*rows, Row(f"{label}: resident peak", resident_peak_bytes() / 1e9, "GB", demand=4.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="measure a prompt of so many tokens beside the forward pass")
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met")
    options = parser.parse_args()
    if options.tokens is not None:
        report("long_prompt", measure_beside_forward(options.tokens), options.check)
        return
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
