"""The dense map embed -> final with `precision="split"` against float32, on a real model with weights in bfloat16.

What the trial of `linearize` decided on this machine is printed. Where it splits products, the time of the dense map is
compared with float32's, and both with float64. `--force` splits them whatever the trial finds.
"""

from __future__ import annotations

import sys

import torch

import loclin
from harness import Row, interleaved, report, say, timed
from harness import arguments as parse
from loclin.linearization import Linearization
from loclin.network.split_choice import Shares, given_shares
from models import BUDGET, PROMPT, fresh

NAME, DEMAND = "smollm2-135m", 0.8


def linearized(precision: str) -> Linearization:
    model = loclin.load(NAME)
    with torch.no_grad():
        for weight in model.hf.parameters():
            weight.copy_(weight.bfloat16())
    return loclin.linearize(model, PROMPT, precision=precision, memory=BUDGET)


def main() -> None:
    force = "--force" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--force"]
    options = parse(__doc__ or "")
    if force:
        given_shares.set(Shares(0.5, 0.5))
    seconds = timed(lambda: linearized("split"))
    lin, single = linearized("split"), linearized("single")
    note = f"{NAME}: {'forced' if force else lin.trace.split.note}"
    say(note)
    rows = [Row(f"{note}: load and linearize, certificate included", seconds, "s")]
    if lin.trace.split.layers:
        runs = interleaved(
            {"split": lambda: fresh(lin).dense(), "float32": lambda: fresh(single).dense()},
            2 if options.quick else 5,
            NAME,
        )
        exact = fresh(linearized("double")).dense()
        for name, run in runs.items():
            error = ((run.found - exact).norm() / exact.norm()).item()
            rows.append(Row(f"{NAME}: {name}, difference from float64", error, "relative", demand=1e-6))
        one, other = runs["split"].seconds, runs["float32"].seconds
        demand = None if force else DEMAND
        rows.append(Row(f"{NAME}: dense map, split", one, "s", "float32", one / other, demand))
    for kind, each in (("split", lin), ("float32", single)):
        error = each.certify().reconstruction_error
        rows.append(Row(f"{NAME}: certificate of precision={kind}", error, "relative", demand=3e-6))
    report("split", rows, options.check)


if __name__ == "__main__":
    main()
