"""The planner: `svd` by plan "auto" against the best single route, over widths, lengths, and ranks.

Random two-layer models. A combination whose chosen route the plan puts above 4 s is dropped, and so is a single route
that it puts there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

from harness import Row, interleaved, say, show
from loclin.linearization import Linearization
from models import decaying, fresh
from rivals import ours

_MOST_SECONDS = 4.0
_DEMAND = 1.10


@dataclass(frozen=True)
class Trial:
    """One combination: the seconds of each single route and of auto."""

    label: str
    singles: dict[str, float]
    auto: float
    taken: str

    @property
    def best(self) -> str:
        """The fastest single route."""
        return min(self.singles, key=self.singles.__getitem__)

    @property
    def ratio(self) -> float:
        """Auto's seconds against the best's."""
        return self.auto / self.singles[self.best]


def measure(quick: bool) -> tuple[list[Row], list[Row]]:
    """(the worst ratio, every combination's)."""
    widths, lengths = ((512,), (2, 8)) if quick else ((512, 2048), (2, 8, 64))
    patience = 0.5 if quick else 1.5
    trials, dropped = [], 0
    for d, T in product(widths, lengths):
        lin = decaying(d, 2, T)
        for (k, tolerance), joint in product(((1, 1e-2), (8, 1e-3)), (False, True)):
            label = f"d={d} T={T} k={k} {tolerance:g} {'joint' if joint else 'tokens'}"
            say(f"planner: {label}")
            found = _trial(lin, k, tolerance, joint, label, patience)
            trials, dropped = ([*trials, found], dropped) if found else (trials, dropped + 1)
    _show(trials)
    worst = max(trials, key=lambda trial: trial.ratio)
    against = f"best single route of {len(trials)} combinations: {worst.label}, {worst.best}; auto took {worst.taken}"
    rows = [
        Row("planner, worst combination", worst.auto, "s", against, worst.ratio, _DEMAND),
        Row("planner, combinations within the demand", sum(trial.ratio <= _DEMAND for trial in trials), "combinations"),
        Row("planner, combinations where auto took the best route", sum(t.taken == t.best for t in trials), ""),
        Row("planner, combinations dropped as too long", dropped, "combinations"),
    ]
    details = [Row(f"planner, {t.label}", t.auto, "s", f"{t.best}; auto took {t.taken}", t.ratio) for t in trials]
    return rows, details


def _trial(lin: Linearization, k: int, tolerance: float, joint: bool, label: str, patience: float) -> Trial | None:
    plan = fresh(lin).plan(k=k, joint=joint, tolerance=tolerance)
    seconds = {route.name: route.cost.seconds for route in plan.methods}
    names = [name for name, expected in seconds.items() if expected <= _MOST_SECONDS]
    if not names:
        say(f"planner: dropped {label}: {min(seconds.values()):.0f} s expected")
        return None
    routes = {name: partial(ours, lin, joint, name, k, tolerance) for name in [*names, "auto"]}
    runs = interleaved(routes, 5, f"planner, {label}", patience)
    return Trial(label, {name: runs[name].seconds for name in names}, runs["auto"].seconds, runs["auto"].found.method)


def _show(trials: list[Trial]) -> None:
    names = sorted({name for trial in trials for name in trial.singles})
    lines = [
        [t.label, *(f"{t.singles[name]:.3f}" if name in t.singles else "" for name in names)]
        + [f"{t.auto:.3f}", t.taken, f"{t.ratio:.2f}"]
        for t in trials
    ]
    show("planner: seconds", ["combination", *names, "auto", "auto took", "ratio to best"], lines)
