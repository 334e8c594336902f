"""The tables of `docs/plan.md`: the paper's models on four machines, each planned from its config in `bench/configs`.

Prints Markdown. A model that does not fit a machine's memory in bfloat16 is planned with its layers on disk.
"""

from __future__ import annotations

from pathlib import Path

import loclin
from harness import say
from loclin.analyses.estimate import AnalysisEstimate, Estimate
from loclin.common.rehearsal import Rates
from loclin.report.estimate import duration, size

CONFIGS = Path(__file__).parent / "configs"
MACHINES = {
    "laptop, 16 GB": (16e9, Rates(2e11, 5e10, 3e9)),
    "card, 24 GB": (24e9, Rates(4e13, 9e11, 3e9)),
    "H100, 80 GB": (80e9, Rates(5e13, 3e12, 3e9)),
    "eight H100s": (640e9, Rates(5e13, 3e12, 3e9)),
}
"""Memory; and in a second float32 flops, bytes of memory, bytes of disk. Layers run one after the other: eight cards
have the memory of eight and the speed of one."""
ANALYSES = ("attribute", "certify", "joint-svd", "dense")
TOKENS = 8


def main() -> None:
    print(f"| model | machine | layers | weights held | {' | '.join(ANALYSES)} |")
    print("| --- | --- | --- | ---: |" + " --- |" * len(ANALYSES))
    for path in sorted(CONFIGS.glob("*.json")):
        say(path.stem)
        ways = {"in memory": plan(path, stream=False), "on disk": plan(path, stream=True)}
        for machine, (room, rates) in MACHINES.items():
            fits = max(one.peak for one in ways["in memory"].analyses) <= room
            way = "in memory" if fits else "on disk"
            cells = [cell(one, room, rates) for one in ways[way].analyses if one.name != "linearize"]
            print(f"| {' | '.join([path.stem, machine, way, size(ways[way].weights), *cells])} |", flush=True)


def plan(path: Path, stream: bool) -> Estimate:
    """The plan of a model, with the budget and the methods of a laptop."""
    return loclin.estimate(
        path.stem,
        tokens=TOKENS,
        analyses=ANALYSES,
        config_file=path,
        dtype="bfloat16",
        available="16GB",
        stream=stream,
        rate_flops=2e11,
        rate_memory=5e10,
        progress=False,
    )


def cell(one: AnalysisEstimate, room: float, rates: Rates) -> str:
    """Peak memory and time; crossed out where it does not fit."""
    text = f"{size(one.peak)}, {duration(one.seconds_on(rates))}"
    return text if one.peak <= room else f"~~{text}~~"


if __name__ == "__main__":
    main()
