"""docs/benchmarks.md, made from bench/results: what was measured, on which machine, when, and against what."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its file in bench/results, its heading, what it measures, and the command that repeats it."""

    name: str
    title: str
    about: str
    command: str
    details: str = "(?!)"  # rows whose names match it are left to the file


BENCHMARKS = (
    Benchmark(
        "dense",
        "Dense map",
        "The whole J of every token, against PyTorch's Jacobians of the same frozen model, and against the matmul "
        "limit: every column through every weight, at the speed of one large product measured in the same run. "
        "Matrices that are formed once can be faster than that.",
        "dense.py",
    ),
    Benchmark(
        "spectra",
        "Spectra",
        "Singular triples with bounds, norms and stable ranks, against the dense map and scikit-learn's "
        "`randomized_svd`.",
        "spectra.py",
        details="planner, d=|.*extra peak memory",
    ),
    Benchmark(
        "scaling",
        "Scaling",
        "How time grows with the width d, the prompt's length T and the number of layers L, on random models. Times "
        "and peaks of the single sizes are in the file.",
        "scaling.py",
    ),
    Benchmark(
        "layers",
        "Every layer",
        "Attention output, MLP output and residual stream of every layer, against one dense map, and against the "
        "paper's way: a Jacobian and a `randomized_svd` for each map.",
        "layers.py",
    ),
    Benchmark(
        "wide",
        "A wide model in half precision",
        "A 3B shape in bfloat16 with float32 maps; the peak is memory beside the weights.",
        "wide.py",
    ),
    Benchmark(
        "long_prompt",
        "Long prompts",
        'Thousands of tokens with `memory="2GB"`, against the model\'s own forward pass.',
        "long_prompt.py",
    ),
    Benchmark(
        "streaming",
        "Layers on disk",
        "A model whose layers stay on disk, against the same model in memory.",
        "streaming.py",
    ),
    Benchmark(
        "plan",
        "Plan: planned memory and flops against runs",
        "What `loclin plan` said in advance, against what the analyses then took.",
        "plan.py",
    ),
    Benchmark(
        "steering",
        "Steering",
        "Making an operator, and generating with it. The comparison of 22 methods is on "
        "[Steering](steering.md#results).",
        "steering.py --parts cost",
    ),
)
HEADER = """# Benchmarks

<!-- Written by bench/page.py from bench/results; do not edit. -->

`make bench` runs all of this (an hour or so) and writes this page. What is compared runs in turn, in one process and on
one machine, so that ratios are more reliable than seconds. *Demand* is the largest ratio (or, without a ratio, the
largest value) that we count as good enough; what does not reach it says **no**.
"""


def write_page(results: Path = RESULTS) -> str:
    """The text of the page, from the JSON files in a folder."""
    found = {one: json.loads((results / f"{one.name}.json").read_text()) for one in BENCHMARKS}
    sections = [line for one, run in found.items() for line in _describe(one, run)]
    return "\n".join([HEADER, *_summarise(found), *sections])


def _summarise(found: dict[Benchmark, dict[str, Any]]) -> list[str]:
    """One line for each benchmark: when, with what, and how many demands are met."""
    lines = ["| benchmark | date | machine | demands met |", "| --- | --- | --- | --- |"]
    for one, run in found.items():
        met = [row["met"] for row in run["rows"] if row["met"] is not None]
        count = f"{sum(met)} of {len(met)}" if met else "–"
        lines.append(f"| [{one.title}](#{_anchor(one.title)}) | {run['date'][:10]} | {_machine(run)} | {count} |")
    return [*lines, ""]


def _describe(one: Benchmark, run: dict[str, Any]) -> list[str]:
    """The section of one benchmark: rows with a ratio or a demand; the others are in its file."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"## {one.title}",
        "",
        one.about,
        "",
        f"`python bench/{one.command}`, {run['date'][:16].replace('T', ' ')} UTC; {_machine(run)}; {versions}.",
        "",
    ]
    rows = [
        row
        for row in run["rows"]
        if (row["ratio"] is not None or row["demand"] is not None) and not re.match(one.details, row["name"])
    ]
    lines += ["| what | measured | ratio | demand | met | against |", "| --- | ---: | ---: | ---: | --- | --- |"]
    lines += [_row(row) for row in rows]
    if left := len(run["rows"]) - len(rows):
        lines += ["", f"{left} more figures, of which nothing is demanded, are in `bench/results/{one.name}.json`."]
    return [*lines, ""]


def _row(row: dict[str, Any]) -> str:
    demand = "" if row["demand"] is None else f"≤ {row['demand']:.3g}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    return f"| {row['name']} | {_value(row)} | {ratio} | {demand} | {met} | {row['against']} |"


def _value(row: dict[str, Any]) -> str:
    """A value with its unit; bytes in MB."""
    if row["unit"] == "B":
        return f"{row['value'] / 1e6:,.0f} MB"
    return f"{row['value']:.4g} {row['unit']}".rstrip()


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']}, {machine['cores']} cores, {threads}"


def _anchor(title: str) -> str:
    """The anchor of a heading, on the site and on GitHub."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(write_page())
    print(f"wrote {PAGE}")
