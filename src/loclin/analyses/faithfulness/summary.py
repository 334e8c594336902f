"""Tables of the study: means over prompts with confidence intervals, and rank correlations, by SciPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loclin.analyses.faithfulness.prompts import Half
from loclin.analyses.faithfulness.study import Faithfulness, PromptResult
from loclin.errors import MissingExtraError

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 3
"""The smallest number of ranked tokens of a prompt that counts."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts, and its confidence interval at `LEVEL` (bootstrap over prompts)."""

    mean: float
    low: float
    high: float
    n: int


def correlations(study: Faithfulness, half: Half, effect: str, last: bool, sizes: bool = False) -> dict[str, Interval]:
    """Compute the rank correlation (Spearman) of each method's shares with single-token effects, the best first.

    The effect is `"removed"` or `"replaced"`; `last`: rank the last token, too; `sizes`: take |share| instead.
    """
    values = _correlate(study, half, effect, last, sizes)
    return _sort({name: interval(found) for name, found in values.items()})


def advantage(study: Faithfulness, half: Half, effect: str, last: bool, one: str, other: str) -> Interval:
    """Compute by how much one method's rank correlation exceeds another's, prompt by prompt."""
    values = _correlate(study, half, effect, last, False)
    return interval([a - b for a, b in zip(values[one], values[other], strict=True)])


def hits(study: Faithfulness, half: Half, effect: str, last: bool) -> dict[str, Interval]:
    """Count how often the token with the largest share is the one with the largest effect; also for a random guess."""
    values: dict[str, list[float]] = {}
    for prompt, chosen in _select_ranked(study, half, last):
        largest = np.take(prompt.effects[effect], chosen).argmax()
        for name, shares in prompt.shares.items():
            values.setdefault(name, []).append(float(np.take(shares, chosen).argmax() == largest))
        values.setdefault("random", []).append(1 / len(chosen))
    return _sort({name: interval(found) for name, found in values.items()})


def kinds(study: Faithfulness, half: Half, effect: str, last: bool, method: str) -> dict[str, Interval]:
    """Compute one method's rank correlation for each kind of prompt."""
    values: dict[str, list[float]] = {}
    for prompt, chosen in _select_ranked(study, half, last):
        found = rank_correlations(np.take(prompt.shares[method], chosen), np.take(prompt.effects[effect], chosen))
        values.setdefault(prompt.kind, []).extend(found)
    return {name: interval(found) for name, found in values.items()}


def deletion(study: Faithfulness, test: str) -> dict[str, Interval]:
    """Average the fall of the log-probability over each deletion curve, by method; random orders count as one."""
    values: dict[str, list[float]] = {}
    for prompt in study.prompts:
        areas: dict[str, list[float]] = {}
        for name, curve in prompt.curves.get(test, {}).items():
            if curve:
                areas.setdefault("random" if name.startswith("random") else name, []).append(float(np.mean(curve)))
        for name, found in areas.items():
            values.setdefault(name, []).append(float(np.mean(found)))
    return _sort({name: interval(found) for name, found in values.items()})


def apart(study: Faithfulness, method: str) -> dict[str, dict[str, Interval]]:
    """Compare effects and shares of attention sinks, the last token and all other tokens.

    `removed` and `replaced` are the mean falls of the log-probability for one token, `share` its fraction of the sum of
    |share|.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for prompt in study.prompts:
        last, sizes = len(prompt.tokens) - 1, np.abs(prompt.shares[method])
        others = [i for i in range(last) if i not in prompt.sinks]
        ends = [i for i in [last] if i not in prompt.sinks]
        groups = {"attention sink": prompt.sinks, "last token": ends, "other tokens": others}
        numbers = prompt.effects | {"share": (sizes / sizes.sum()).tolist()}
        for group, positions in groups.items():
            for name, found in numbers.items():
                if positions:
                    values.setdefault(group, {}).setdefault(name, []).append(float(np.take(found, positions).mean()))
    return {group: {name: interval(found) for name, found in parts.items()} for group, parts in values.items()}


def planes(study: Faithfulness) -> dict[tuple[str, int], dict[str, Interval]]:
    """Average the effects of projecting the input, by kind of subspace and number of vectors."""
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for found in (one for prompt in study.prompts for one in prompt.planes):
        numbers = values.setdefault((found.plane, found.k), {"moved": [], "drop": [], "output": []})
        for name, rows in numbers.items():
            rows.append(getattr(found, name))
    return {key: {name: interval(rows) for name, rows in parts.items()} for key, parts in values.items()}


def _correlate(study: Faithfulness, half: Half, effect: str, last: bool, sizes: bool) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for prompt, chosen in _select_ranked(study, half, last):
        scores = np.asarray(list(prompt.shares.values()))[:, chosen]
        found = rank_correlations(np.abs(scores) if sizes else scores, np.take(prompt.effects[effect], chosen))
        for name, value in zip(prompt.shares, found, strict=True):
            values.setdefault(name, []).append(value)
    return values


def _select_ranked(study: Faithfulness, half: Half, last: bool) -> Iterator[tuple[PromptResult, Sequence[int]]]:
    """Yield the prompts of a half that have enough tokens, and the positions that are ranked."""
    for prompt in study.prompts:
        length = len(prompt.tokens)
        chosen = [i for i in range(length if last else length - 1) if i not in prompt.sinks]
        if prompt.half == half and len(chosen) >= FEWEST:
            yield prompt, chosen


def _sort(found: dict[str, Interval]) -> dict[str, Interval]:
    return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].mean, nan=-2.0)))


def check_scipy() -> None:
    """Raise MissingExtraError without SciPy, before anything is computed."""
    try:
        import scipy.stats  # noqa: F401 (the tables need it later)
    except ImportError:
        raise MissingExtraError("the study", "SciPy", "faithfulness") from None


def rank_correlations(scores: ArrayLike, effects: ArrayLike) -> list[float]:
    """Compute Spearman's correlation of each row of `scores` `[M, n]` with `effects` `[n]`; NaN if all are equal."""
    from scipy.stats import rankdata

    rows = _center(rankdata(np.atleast_2d(np.asarray(scores, dtype=float)), axis=1))
    target = _center(rankdata(np.asarray(effects, dtype=float)))
    with np.errstate(invalid="ignore"):
        found: list[float] = (rows @ target / (np.linalg.norm(rows, axis=1) * np.linalg.norm(target))).tolist()
    return found


def _center(ranks: np.ndarray) -> np.ndarray:
    return np.asarray(ranks - ranks.mean(-1, keepdims=True))


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Compute the mean of one number per prompt and its BCa bootstrap interval, without NaN."""
    from scipy.stats import bootstrap

    known = np.asarray([value for value in values if not np.isnan(value)], dtype=float)
    if len(known) < 2 or np.ptp(known) == 0:
        mean = float(known.mean()) if len(known) else float("nan")
        return Interval(mean, mean, mean, len(known))
    found = bootstrap((known,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=seed)
    low, high = map(float, found.confidence_interval)
    return Interval(float(known.mean()), low, high, len(known))
