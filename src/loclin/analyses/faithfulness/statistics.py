"""Rank correlations, and means with confidence intervals, by SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loclin.errors import MissingExtraError

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts, and its confidence interval at `LEVEL` (bootstrap over prompts)."""

    mean: float
    low: float
    high: float
    n: int


def check_scipy() -> None:
    """Refuse to start without SciPy.

    Raises MissingExtraError when it is not installed.
    """
    try:
        import scipy.stats  # noqa: F401 (the tables need it later)
    except ImportError:
        raise MissingExtraError("the study", "SciPy", "faithfulness") from None


def rank_correlations(scores: ArrayLike, effects: ArrayLike) -> list[float]:
    """Compute Spearman's rank correlation of each row of `scores` `[M, n]` with `effects` `[n]`; ties get mean ranks.

    NaN if all numbers of a row, or all effects, are equal.
    """
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
    return Interval(
        float(known.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high), len(known)
    )
