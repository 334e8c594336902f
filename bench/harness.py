"""What every benchmark shares: timing, peak memory, the matmul limit, the table and the JSON file."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_SIDE = 2048


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


def extra_peak_bytes(work: Callable[[], object]) -> float:
    """How far resident memory rises above its start during one call; NaN where the system cannot say (not Linux)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would hide the rise
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except (OSError, AttributeError):
        work()
        return float("nan")
    kept = work()
    peak = _resident("VmHWM")
    del kept
    return float(max(0, peak - before))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


def matmul_rate() -> float:
    """Float32 flops per second of one large matrix product into memory that is already there."""
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    out = torch.empty(_SIDE, _SIDE)
    torch.mm(a, b, out=out)
    return 2 * _SIDE**3 / min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(3))


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met")
    parser.add_argument("--quick", action="store_true", help="one model and few repeats")
    return parser.parse_args()


def report(name: str, rows: list[Row], check: bool) -> None:
    """Print the table, write `bench/results/NAME.json`, and with `check` exit 1 when a demand is not met."""
    table = Table("what", "value", "unit", "against", "ratio", "demand", "met", title=name, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        demand = "" if row.demand is None else f"≤ {row.demand:.3g}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        table.add_row(row.name, f"{row.value:.4g}", row.unit, row.against, ratio, demand, met)
    Console(width=170 if not sys.stdout.isatty() else None).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("loclin", "torch", "transformers")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")
    if check and any(row.met is False for row in rows):
        sys.exit(1)
