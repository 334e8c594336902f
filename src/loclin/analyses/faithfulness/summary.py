"""What the study's numbers say: means over prompts with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from loclin.analyses.faithfulness.prompts import Half
from loclin.analyses.faithfulness.statistics import Interval, interval, rank_correlations
from loclin.analyses.faithfulness.study import PromptResult, Study

FEWEST = 3
"""Tokens that a prompt must have to be ranked."""


def correlations(study: Study, half: Half, effect: str, last: bool, sizes: bool = False) -> dict[str, Interval]:
    """Spearman's rank correlation of each method's shares with single-token effects, the best first.

    Parameters
    ----------
    study
        The measured prompts.
    half
        Which of them.
    effect
        `"removed"` or `"replaced"`.
    last
        Whether the last token is ranked too.
    sizes
        Take |share| instead of the share.
    """
    values = _correlations(study, half, effect, last, sizes)
    return _sorted({name: interval(found) for name, found in values.items()})


def advantage(study: Study, half: Half, effect: str, last: bool, one: str, other: str) -> Interval:
    """By how much one method's rank correlation exceeds another's, prompt by prompt."""
    values = _correlations(study, half, effect, last, False)
    return interval([a - b for a, b in zip(values[one], values[other], strict=True)])


def hits(study: Study, half: Half, effect: str, last: bool) -> dict[str, Interval]:
    """How often a method's largest share is the token whose loss costs most; and how often a blind guess is."""
    values: dict[str, list[float]] = {}
    for prompt, chosen in _ranked(study, half, last):
        effects = np.take(prompt.effects[effect], chosen)
        for name, shares in prompt.shares.items():
            hit = np.take(shares, chosen).argmax() == effects.argmax()
            values.setdefault(name, []).append(float(hit))
        values.setdefault("random", []).append(1 / len(chosen))
    return _sorted({name: interval(found) for name, found in values.items()})


def kinds(study: Study, half: Half, effect: str, last: bool, method: str) -> dict[str, Interval]:
    """One method's rank correlation for each kind of prompt."""
    values: dict[str, list[float]] = {}
    for prompt, chosen in _ranked(study, half, last):
        found = rank_correlations(np.take(prompt.shares[method], chosen), np.take(prompt.effects[effect], chosen))
        values.setdefault(prompt.kind, []).extend(found)
    return {name: interval(found) for name, found in values.items()}


def deletion(study: Study, test: str) -> dict[str, Interval]:
    """The mean fall of the log-probability over the steps of a deletion curve, by method; random orders together."""
    values: dict[str, list[float]] = {}
    for prompt in study.prompts:
        areas: dict[str, list[float]] = {}
        for name, curve in prompt.curves.get(test, {}).items():
            if curve:
                areas.setdefault("random" if name.startswith("random") else name, []).append(float(np.mean(curve)))
        for name, found in areas.items():
            values.setdefault(name, []).append(float(np.mean(found)))
    return _sorted({name: interval(found) for name, found in values.items()})


def apart(study: Study, method: str) -> dict[str, dict[str, Interval]]:
    """What is left out of rankings: for sinks, the last token and all other words, their effects and their shares.

    `removed` and `replaced` are falls of the log-probability for one token, `share` is its part of the sum of |share|.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for prompt in study.prompts:
        length, sizes = len(prompt.tokens), np.abs(prompt.shares[method])
        groups = {
            "attention sink": prompt.sinks,
            "last token": [i for i in [length - 1] if i not in prompt.sinks],
            "other tokens": [i for i in range(length - 1) if i not in prompt.sinks],
        }
        numbers = prompt.effects | {"share": (sizes / sizes.sum()).tolist()}
        for group, positions in groups.items():
            for name, found in numbers.items():
                if positions:
                    values.setdefault(group, {}).setdefault(name, []).append(float(np.take(found, positions).mean()))
    return {group: {name: interval(found) for name, found in parts.items()} for group, parts in values.items()}


def planes(study: Study) -> dict[tuple[str, int], dict[str, Interval]]:
    """What projecting the input does, by plane and number of vectors."""
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for prompt in study.prompts:
        for found in prompt.planes:
            numbers = values.setdefault((found.plane, found.k), {"moved": [], "drop": [], "output": []})
            for name, rows in numbers.items():
                rows.append(getattr(found, name))
    return {key: {name: interval(rows) for name, rows in parts.items()} for key, parts in values.items()}


def _correlations(study: Study, half: Half, effect: str, last: bool, sizes: bool) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for prompt, chosen in _ranked(study, half, last):
        scores = np.asarray(list(prompt.shares.values()))[:, chosen]
        found = rank_correlations(np.abs(scores) if sizes else scores, np.take(prompt.effects[effect], chosen))
        for name, value in zip(prompt.shares, found, strict=True):
            values.setdefault(name, []).append(value)
    return values


def _ranked(study: Study, half: Half, last: bool) -> Iterator[tuple[PromptResult, Sequence[int]]]:
    """The prompts of a half that have tokens enough, and the positions that are ranked."""
    for prompt in study.prompts:
        length = len(prompt.tokens)
        chosen = [i for i in range(length if last else length - 1) if i not in prompt.sinks]
        if prompt.half == half and len(chosen) >= FEWEST:
            yield prompt, chosen


def _sorted(found: dict[str, Interval]) -> dict[str, Interval]:
    return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].mean, nan=-2.0)))
