"""A sweep over layers and strengths: how much steering raises a concept's words, and what it costs in fluency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.arguments import real
from loclin.common.brief import brief
from loclin.common.progress import Progress, bar, steps, with_progress
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.steering.base import Steering
from loclin.steering.form import Form
from loclin.steering.replay import Replay
from loclin.steering.writing import Continuation

STRENGTHS: dict[Form, tuple[float, ...]] = {
    "add": (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0),
    "interpolate": (0.95, 0.9, 0.8, 0.65, 0.5, 0.3),
}
"""The strengths that a sweep tries."""
MAX_KL = 2.0
"""The KL divergence that a sweep allows, in nats: above about this, the text of the packaged models degenerates."""


@dataclass(frozen=True)
class Score:
    """What steering changes at the next token, for each prompt, in nats."""

    log_p: Float[Tensor, " B"]  # log P(the next token begins one of the concept's words) of the steered model
    gain: Float[Tensor, " B"]  # the same minus the unsteered model's
    kl: Float[Tensor, " B"]  # KL(steered || unsteered) of the next token: the loss of fluency

    __repr__ = brief


@dataclass(frozen=True)
class Trial:
    """One layer and strength of a sweep: means over the prompts, and the text written at the first prompt, if any."""

    layer: int
    strength: float
    gain: float
    kl: float
    written: Continuation | None = None


def trial_table(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """List the trials, one per row: layer, strength, gain, KL and the text written."""
    columns = {name: [getattr(trial, name) for trial in trials] for name in ("layer", "strength", "gain", "kl")}
    return {**columns, "text": [None if trial.written is None else trial.written.text for trial in trials]}


@dataclass(frozen=True)
class Sweep(Result):
    """Every layer and strength that was tried, and the best one within the KL limit.

    `best` has the largest gain among those with `kl <= max_kl`, or the smallest KL if there is none. `steer` chooses it
    by the texts that the trials write.
    """

    form: Form
    trials: list[Trial]
    best: Trial
    max_kl: float  # in nats
    unsteered: float  # the unsteered model's mean log-probability of the concept's words

    provenance: Provenance | None = None  # the result is about several prompts
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per trial: layer, strength, gain, KL and the text written."""
        return trial_table(self.trials)

    @property
    def within(self) -> list[Trial]:
        """The trials within the KL limit; the best one alone if there is none."""
        return [trial for trial in self.trials if trial.kl <= self.max_kl] or [self.best]


@in_plain_torch
def score(unsteered: Float[Tensor, "B V"], ids: Sequence[int], steered: Float[Tensor, "B V"]) -> Score:
    """Compare the log-probabilities of steered predictions with those of the unsteered ones."""
    chosen = torch.tensor(list(ids), device=steered.device)
    before, after = (table[:, chosen].logsumexp(1) for table in (unsteered, steered))
    return Score(after, after - before, (steered.exp() * (steered - unsteered)).sum(1))


@in_plain_torch
@with_progress
def sweep(
    replay: Replay,
    ids: Sequence[int],
    steering: Callable[[int], Steering],
    layers: Sequence[int],
    *,
    strengths: Sequence[float] | None = None,
    form: Form = "add",
    max_kl: float = MAX_KL,
    progress: Progress = True,
) -> Sweep:
    """Try strengths at layers, and choose the largest gain within a KL limit, as means over the prompts, in nats.

    `ids` are the tokens that begin the concept's words; `steering` makes the steering of a layer; other options are as
    for `steer`. Cost: for each layer, making its steering, and for each strength one pass through the layers above.
    """
    tell = steps(progress)
    strengths = STRENGTHS[form] if strengths is None else strengths
    real("max_kl", max_kl, 0.0)
    for strength in strengths:
        real("strength", strength)
    if not layers or not strengths:
        raise OptionError("a sweep needs at least one layer and one strength: give both, or leave strengths out")
    trials = []
    for layer in layers:
        tell(f"trying layer {layer}")
        made = steering(layer)
        S = replay.sums(made)
        for strength in bar(strengths, desc=f"layer {layer}", unit="strength"):
            found = score(replay.unsteered, ids, replay.log_probs(made, strength, form, S))
            if found.kl.isfinite().all():
                trials.append(Trial(layer, float(strength), found.gain.mean().item(), found.kl.mean().item()))
    if not trials:
        raise OptionError("with every strength of the sweep the model's values are not finite; try smaller strengths")
    within = [trial for trial in trials if trial.kl <= max_kl]
    best = max(within, key=lambda t: t.gain) if within else min(trials, key=lambda t: t.kl)
    unsteered = replay.unsteered[:, list(ids)].logsumexp(1).mean().item()
    return Sweep(form, trials, best, max_kl, unsteered)


def depths(n_layers: int) -> list[int]:
    """Choose the layers that a sweep tries: at a third, half, two thirds and five sixths of the depth."""
    return sorted({max(0, round(n_layers * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)})
