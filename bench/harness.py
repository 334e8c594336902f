"""What every benchmark shares: timing, peak memory, the matmul limit, the table and the JSON file."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from loclin.common.versions import versions_of

RESULTS = Path(__file__).parent / "results"
_SIDE = 2048
_CPU = torch.device("cpu")


Found = TypeVar("Found")


@dataclass(frozen=True)
class Timed(Generic[Found]):
    """What a route found, and in how many seconds at best."""

    seconds: float
    found: Found


@dataclass(frozen=True)
class Row:
    """One figure. `ratio` is value / against's value; `demand` the largest ratio (or value) that is good enough."""

    name: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    demand: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the demand is met; None where there is none."""
        if self.demand is None:
            return None
        return (self.value if self.ratio is None else self.ratio) <= self.demand


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    routes: Mapping[str, Callable[[], Found]], repeats: int, label: str, patience: float = 60.0
) -> dict[str, Timed[Found]]:
    """The best seconds of each route and what it found last; the routes take turns, so that all share a busy machine.

    A route that has spent `patience` seconds is not run again. What takes a while says so on the way.
    """
    runs: dict[str, Timed[Found]] = {}
    spent = dict.fromkeys(routes, 0.0)
    for run in range(repeats):
        for name, work in routes.items():
            if run and spent[name] >= patience:
                continue
            start = time.perf_counter()
            found = work()
            seconds = time.perf_counter() - start
            spent[name] += seconds
            best = min(seconds, runs[name].seconds) if run else seconds
            runs[name] = Timed(best, found)
            if seconds > 2:
                say(f"{label}: {name}, run {run + 1}: {seconds:.1f} s")
    return runs


def say(text: str) -> None:
    """A line of progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def in_new_process(script: str, *arguments: str) -> str:
    """What a script prints when run alone: a process that has done other work keeps memory, and hides a peak in it."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def resident_peak_bytes() -> int:
    """The most memory this process has held since it started, or since `forget_peak`."""
    return _resident("VmHWM")


def extra_peak_bytes(work: Callable[[], object]) -> float:
    """How far resident memory rises above its start during one call; NaN where the system cannot say (not Linux)."""
    try:
        before = forget_peak()
    except (OSError, AttributeError):
        work()
        return float("nan")
    kept = work()
    peak = _resident("VmHWM")
    del kept
    return float(max(0, peak - before))


def forget_peak() -> int:
    """Forget the peak so far; returns the bytes that are resident now."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would hide a rise
    now = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return now


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


def matmul_rate(device: torch.device = _CPU, dtype: torch.dtype = torch.float32, side: int = _SIDE) -> float:
    """Flops per second of one large matrix product into memory that is already there."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        wait_for(device)

    multiply()
    return 2 * side**3 / min(timed(multiply) for _ in range(3))


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments(description: str, parts: Sequence[str] = ()) -> argparse.Namespace:
    """The options that every benchmark has, and which of its parts to run, where it has several."""
    parser = argparse.ArgumentParser(description=description)
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="run only these")
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met")
    parser.add_argument("--quick", action="store_true", help="one model and few repeats")
    return parser.parse_args()


def show(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column of which names its lines."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    _print(table)


def _print(table: Table) -> None:
    Console(width=170 if not sys.stdout.isatty() else None).print(table)


def report(
    name: str, rows: list[Row], check: bool, details: Sequence[Row] = (), partly: bool = False, **more: object
) -> None:
    """Print the table, write `bench/results/NAME.json`, and with `check` exit 1 when a demand is not met.

    Details are written and not printed: another table has shown them. After a run of some parts only, rows of the
    others stay in the file as they were.
    """
    table = Table("what", "value", "unit", "against", "ratio", "demand", "met", title=name, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        demand = "" if row.demand is None else f"≤ {row.demand:.3g}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        table.add_row(row.name, f"{row.value:.4g}", row.unit, row.against, ratio, demand, met)
    _print(table)
    write(name, rows, details, partly, **more)
    if check and any(row.met is False for row in rows):
        sys.exit(1)


def write(name: str, rows: list[Row], details: Sequence[Row] = (), partly: bool = False, **more: object) -> None:
    """Write `bench/results/NAME.json` alone; see `report`. `more` stands beside the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = [asdict(row) | {"met": row.met} for row in [*rows, *details]]
    if partly and path.exists():
        new = {row["name"] for row in found}
        found += [row for row in json.loads(path.read_text())["rows"] if row["name"] not in new]
    content = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions_of("loclin", "torch", "transformers"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": found,
        **more,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")
