"""The tables of `docs/plan.md`: the paper's models on four machines, each planned from its config in `bench/configs`.

Prints Markdown. A model that does not fit a machine's memory in bfloat16 is planned with its layers on disk.
"""

from __future__ import annotations

from pathlib import Path

import loclin
from harness import say
from loclin.analyses.estimate import AnalysisEstimate, Estimate
from loclin.report.estimate import duration, scaled, size

CONFIGS = Path(__file__).parent / "configs"
MACHINES = {
    "laptop, 16 GB": ("16GB", 2e11, 5e10, 3e9),
    "card, 24 GB": ("24GB", 4e13, 9e11, 3e9),
    "H100, 80 GB": ("80GB", 5e13, 3e12, 3e9),
    "eight H100s": ("640GB", 5e13, 3e12, 3e9),
}
"""Memory; and in a second float32 flops, bytes of memory, bytes of disk. Layers run one after the other: eight cards
have the memory of eight and the speed of one."""
ANALYSES = ("attribute", "certify", "joint-svd", "dense")
TOKENS = 8


def main() -> None:
    lines = []
    for path in sorted(CONFIGS.glob("*.json")):
        for machine, (memory, flops, moved, read) in MACHINES.items():
            say(f"{path.stem} on {machine}")
            found = plan(path, available=memory, rate_flops=flops, rate_memory=moved, rate_read=read)
            cells = [cell(one) for one in found.analyses if one.name != "linearize"]
            facts = [path.stem, machine, "from disk" if found.stream else "in memory", size(found.weights)]
            lines.append(" | ".join(facts + cells))
    print(f"| model | machine | layers | weights held | {' | '.join(ANALYSES)} |")
    print("| --- | --- | --- | ---: |" + " --- |" * len(ANALYSES))
    for line in lines:
        print(f"| {line} |")


def plan(path: Path, **machine: object) -> Estimate:
    """The plan in memory, or with layers on disk if that does not fit."""
    options = {"tokens": TOKENS, "analyses": ANALYSES, "config_file": path, "dtype": "bfloat16", "progress": False}
    found = loclin.estimate(path.stem, **options, **machine)
    return found if found.analyses[0].fits else loclin.estimate(path.stem, **options, **machine, stream=True)


def cell(one: AnalysisEstimate) -> str:
    """Peak memory, flops and time; bold where it does not fit."""
    text = f"{size(one.peak)}, {scaled(one.flops)}flop, {duration(one.seconds)}"
    return text if one.fits else f"**{text}**"


if __name__ == "__main__":
    main()
