"""The paper's steering claim, from the committed results of `bench/steering.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from claims_rules import Claim, Estimate, Measured
from harness import RESULTS
from steering_figures import at_limit, resampled

LIMIT = 1.0
"""Nats of mean KL divergence from the unsteered prediction, at which gains are compared."""
PUBLISHED, PLAIN, NULL, BASELINE = "operator (published)", "operator", "random direction", "mean difference"
_SAMPLES = 2000

STEERING = Claim(
    "The operator steers",
    "Added to a middle layer's activations, the map of a steering text “imposes” its concept on what the model writes, "
    "“even when it is difficult to fit with the input sequence” (section 3.6, Table 4).",
    "Finished measurements of `python bench/steering.py` (bench/results/steering-MODEL.json, "
    "[steering](steering.md)): 10 concepts on 40 prompts about none of them. Gain is the rise of the "
    "log-probability of the concept's words where the mean KL divergence from the unsteered prediction is 1 nat. "
    "Null model: a random direction. Intervals are bootstrap intervals over prompts and concepts together, and "
    "behind them is the number of pairs, or of sampled texts.",
    lambda _lines: [],
)


@dataclass(frozen=True)
class Gain:
    """A method's gain at equal KL, in all bootstrap samples, and from how many pairs of a concept and a prompt."""

    value: float
    draws: np.ndarray
    n: int

    @classmethod
    def of(cls, held: dict[str, Any], method: str) -> Gain:
        """Read one from the results of a model."""
        pieces = [piece for key, piece in held.items() if key.startswith(f"measure/{method}/")]
        gains, kl = (np.array([piece[what] for piece in pieces]) for what in ("gain", "kl"))
        value = at_limit(gains.mean((0, 2)), kl.mean((0, 2)), LIMIT)
        return cls(value, resampled(gains, kl, LIMIT), gains.shape[0] * gains.shape[2])

    def __sub__(self, other: Gain) -> Gain:
        return Gain(self.value - other.value, self.draws - other.draws, self.n)

    @property
    def estimate(self) -> Estimate:
        """The gain and its interval."""
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return Estimate(float(self.value), float(low), float(high), self.n)


def steer(model: str) -> list[Measured]:
    """Claim 8 on one model."""
    held = json.loads((RESULTS / f"steering-{model}.json").read_text("utf-8"))
    published, plain, null, baseline = (Gain.of(held, name) for name in (PUBLISHED, PLAIN, NULL, BASELINE))
    return [
        Measured("gain of the published operator, nats", published.estimate, at_least=1.0, main=True),
        Measured("the same, less that of a random direction", (published - null).estimate, at_least=0.5, main=True),
        Measured("the concept's words per hundred of sampled text, less unsteered", frequency(held), at_least=1.0),
        Measured("gain of the operator added where its maps end, without the final norm", plain.estimate),
        Measured("gain of a mean difference of hidden states", baseline.estimate),
        Measured("the published operator's gain, less that", (published - baseline).estimate),
    ]


def frequency(held: dict[str, Any]) -> Estimate:
    """How many more of a concept's words the sampled text has with the published operator, per hundred words."""
    steered, normal = (
        {key.rsplit("/", 1)[1]: piece["frequency"] for key, piece in held.items() if key.startswith(f"write/{name}/")}
        for name in (PUBLISHED, "unsteered")
    )
    table = np.array([np.subtract(steered[concept], normal[concept]) for concept in steered])
    random = np.random.default_rng(0)
    draws = [
        table[random.integers(len(table), size=len(table))][:, random.integers(table.shape[1], size=table.shape[1])]
        for _ in range(_SAMPLES)
    ]
    low, high = np.percentile([draw.mean() for draw in draws], [2.5, 97.5])
    return Estimate(float(table.mean()), float(low), float(high), table.size)
