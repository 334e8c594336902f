"""The figures of `bench/steering.py`: gains at equal fluency, their intervals, and tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness import Row, show
from loclin.steering.concepts import packaged_concepts
from steering_methods import ALL, BASELINE, EXPLAINED, MAPPED, SEVERAL

STRENGTHS = (0.03, 0.08, 0.2, 0.45, 0.9, 1.5)
LIMITS = (1.0, 2.0)
"""Nats of mean KL at which methods are compared."""
WRITTEN = {"prompts": 5, "concepts": 10, "seeds": 2, "tokens": 20}
_SAMPLES = 2000


class Tables:
    """The tables, printed as they come and kept as Markdown."""

    def __init__(self) -> None:
        self.text: list[str] = []

    def add(self, title: str, heads: list[str], lines: list[list[str]]) -> None:
        """Print one, and keep it."""
        show(title, heads, lines)
        rows = (f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *lines))
        self.text.append("\n".join([f"### {title}", "", *rows, ""]))


def at_limit(gain: np.ndarray, kl: np.ndarray, limit: float) -> float:
    """Gain where a method's mean KL reaches the limit, by straight lines from (0, 0) through its strengths.

    A method whose KL does not get so far has the largest gain that it reached.
    """
    kl, gain = np.concatenate([[0.0], kl]), np.concatenate([[0.0], gain])
    best = gain[kl <= limit].max()
    for i in range(1, len(kl)):
        if (kl[i - 1] - limit) * (kl[i] - limit) < 0:
            share = (limit - kl[i - 1]) / (kl[i] - kl[i - 1])
            best = max(best, gain[i - 1] + share * (gain[i] - gain[i - 1]))
    return float(best)


def strength_at(gain_kl: np.ndarray, strengths: list[float], limit: float) -> float:
    """The smallest strength at which the mean KL reaches the limit; the largest where it does not."""
    kl, strength = np.concatenate([[0.0], gain_kl]), np.concatenate([[0.0], strengths])
    for i in range(1, len(kl)):
        if kl[i] >= limit > kl[i - 1]:
            return float(strength[i - 1] + (limit - kl[i - 1]) / (kl[i] - kl[i - 1]) * (strength[i] - strength[i - 1]))
    return float(strengths[-1])


def mean_curve(held: dict[str, Any], part: str, name: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [v for k, v in held.items() if k.startswith(f"{part}/{name}/") and k.endswith(f"/{layer}")]
    return tuple(np.mean([np.mean(p[what], axis=1) for p in pieces], axis=0) for what in ("gain", "kl"))


def resampled(gain: np.ndarray, kl: np.ndarray, limit: float) -> np.ndarray:
    """Gain at a limit in every bootstrap sample; `gain` and `kl` are [concepts, strengths, prompts].

    The samples are the same for every method, so that differences of methods are paired.
    """
    random = np.random.default_rng(0)
    concepts, _, prompts = gain.shape
    draws = []
    for _ in range(_SAMPLES):
        c, p = random.integers(concepts, size=concepts), random.integers(prompts, size=prompts)
        draws.append(at_limit(gain[c][..., p].mean((0, 2)), kl[c][..., p].mean((0, 2)), limit))
    return np.array(draws)


def with_interval(value: float, draws: np.ndarray) -> str:
    """A figure and its 95 % interval."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def ideal(unsteered: np.ndarray, limit: float) -> float:
    """The gain of the least surprising way there is: P(words) raised to q and nothing else changed, at that mean KL."""
    p = np.exp(unsteered)

    def mean_kl(tilt: float) -> tuple[float, float]:
        q = p * np.exp(tilt) / (p * np.exp(tilt) + 1 - p)
        return float((q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean()), float(np.log(q / p).mean())

    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_kl(middle)[0] < limit else (low, middle)
    return mean_kl(low)[1]


def tables(name: str, held: dict[str, Any], layers: dict[str, int], shown: Tables) -> list[Row]:
    """Print what was found for the concepts that are finished, and give it as rows."""
    rows, lines = [], []
    names = [c.name for c in packaged_concepts().concepts if f"why/{EXPLAINED[-1]}/{c.name}" in held]
    unsteered = np.array([held[f"unsteered/{n}"] for n in names])
    values, draws = {}, {}
    for method in ALL:
        pieces = [held[f"measure/{method}/{n}/{layers[method]}"] for n in names]
        gain, kl = (np.array([p[what] for p in pieces]) for what in ("gain", "kl"))
        for limit in LIMITS:
            values[method, limit] = at_limit(gain.mean((0, 2)), kl.mean((0, 2)), limit)
            draws[method, limit] = resampled(gain, kl, limit)
    for method in ALL:
        cells = [method, "3 of them" if method == SEVERAL else str(layers[method])]
        for limit in LIMITS:
            value, low, high = values[method, limit], *np.percentile(draws[method, limit], [2.5, 97.5])
            cells.append(with_interval(value, draws[method, limit]))
            rows.append(Row(f"{name}: {method}, gain at KL {limit:g}", value, "nats", f"95 % {low:.2f} to {high:.2f}"))
        here, there = (method, LIMITS[0]), (BASELINE, LIMITS[0])
        ahead = "" if method == BASELINE else with_interval(values[here] - values[there], draws[here] - draws[there])
        lines.append([*cells, ahead, *written(held, method)])
    bound = [f"{ideal(unsteered, limit):+.2f}" for limit in LIMITS]
    lines.append(["best possible at this KL", "", *bound, "", "", "", ""])
    lines.append(["unsteered", "", "0", "0", "", *written(held, "unsteered")])
    title = f"{name}: unsteered log P(words) {unsteered.mean():.2f}; gain at equal KL; sampled text at KL {LIMITS[1]:g}"
    gains = (f"gain, KL {limit:g}" for limit in LIMITS)
    heads = ["method", "layer", *gains, f"less {BASELINE}'s, KL {LIMITS[0]:g}", "words / 100", "loss", "repetition"]
    shown.add(title, heads, lines)
    maps(name, held, shown)
    reasons = {method: [held[f"why/{method}/{n}"] for n in names] for method in EXPLAINED}
    means = {
        key: [float(np.mean([reason[key] for reason in found])) for found in reasons.values()]
        for key in reasons[EXPLAINED[0]][0]
    }
    lines = [[key, *(f"{value:.2f}" for value in values)] for key, values in means.items()]
    shown.add(f"{name}: what an operator adds, means over concepts", ["", *EXPLAINED], lines)
    return rows + [
        Row(f"{name}: {method}, {key}", value, "")
        for key, values in means.items()
        for method, value in zip(EXPLAINED, values, strict=True)
    ]


def written(held: dict[str, Any], method: str) -> list[str]:
    """Frequency, loss and repetition of sampled text, with 95 % intervals over concepts and texts."""
    parts = [piece for key, piece in held.items() if key.startswith(f"write/{method}/")]
    if not parts:
        return [""] * 3
    random, cells = np.random.default_rng(0), []
    for what, digits in (("frequency", 1), ("loss", 2), ("repetition", 2)):
        table = np.array([part[what] for part in parts])
        draws = [
            table[random.integers(len(table), size=len(table))][:, random.integers(table.shape[1], size=table.shape[1])]
            for _ in range(_SAMPLES)
        ]
        low, high = np.percentile([draw.mean() for draw in draws], [2.5, 97.5])
        cells.append(f"{table.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    return cells


def maps(name: str, held: dict[str, Any], shown: Tables) -> None:
    """Strength by layer, from the prompts for choosing: gain / KL."""
    for method in MAPPED:
        layers = sorted({int(k.rsplit("/", 1)[1]) for k in held if k.startswith(f"choose/{method}/")})
        lines = []
        for layer in layers:
            gain, kl = mean_curve(held, "choose", method, layer)
            lines.append([str(layer), *(f"{g:+.2f} / {k:.2f}" for g, k in zip(gain, kl, strict=True))])
        shown.add(f"{name}: {method}, gain / KL by layer and strength", ["layer", *map(str, STRENGTHS)], lines)
