"""Steering, measured: what it gains in a concept's words, and what it costs in fluency."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.common.arguments import real, whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError, PromptError
from loclin.models import Model
from loclin.models.padding import padded
from loclin.steering.base import Steering
from loclin.steering.form import Form
from loclin.steering.replay import Replay

STRENGTHS: dict[Form, tuple[float, ...]] = {
    "add": (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0),
    "interpolate": (0.95, 0.9, 0.8, 0.65, 0.5, 0.3),
}
"""What a sweep tries."""
MAX_KL = 2.0
"""Nats of KL divergence that a sweep allows: past about this, the packaged models' text breaks down."""


@dataclass(frozen=True)
class Score:
    """What steering did to the next token, for each prompt.

    Attributes
    ----------
    log_p
        log P(the next token begins one of the concept's words), steered `[B]`.
    gain
        That less the unsteered one, in nats `[B]`.
    kl
        KL(steered || unsteered) of the next token, in nats `[B]`: the fluency lost, which is how much more the
        unsteered model is surprised by what the steered one says.
    """

    log_p: Float[Tensor, " B"]
    gain: Float[Tensor, " B"]
    kl: Float[Tensor, " B"]

    __repr__ = brief


@dataclass(frozen=True)
class Trial:
    """One cell of a sweep: the means over its prompts, and the text at the first of them where one was written."""

    layer: int
    strength: float
    gain: float
    kl: float
    written: Continuation | None = None


@dataclass(frozen=True)
class Sweep:
    """Strength by layer, and the cell that gains most within the limit.

    Attributes
    ----------
    form
        The form that was swept.
    trials
        Every cell.
    best
        The one with the largest gain among those with `kl <= max_kl`; the one with the least kl where there is none.
        `loclin.steering.steer.steer` chooses by the texts that are written.
    max_kl
        The limit.
    unsteered
        The mean unsteered log-probability of the concept's words.
    """

    form: Form
    trials: list[Trial]
    best: Trial
    max_kl: float
    unsteered: float

    __repr__ = brief

    @property
    def within(self) -> list[Trial]:
        """The cells within the limit; the best alone where there is none."""
        return [trial for trial in self.trials if trial.kl <= self.max_kl] or [self.best]

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return asdict(self)


@in_plain_torch
def score(replay: Replay, ids: Sequence[int], log_probs: Float[Tensor, "B V"]) -> Score:
    """Compare a steered prediction with the unsteered one."""
    chosen = torch.tensor(list(ids), device=log_probs.device)
    before, after = (table[:, chosen].logsumexp(1) for table in (replay.unsteered, log_probs))
    kl = (log_probs.exp() * (log_probs - replay.unsteered)).sum(1)
    return Score(after, after - before, kl)


@in_plain_torch
def sweep(
    replay: Replay,
    ids: Sequence[int],
    steering: Callable[[int], Steering],
    layers: Sequence[int],
    *,
    strengths: Sequence[float] | None = None,
    form: Form = "add",
    max_kl: float = MAX_KL,
    progress: Progress = silent,
) -> Sweep:
    """Try strengths at layers, and choose the largest gain that stays within a limit on the fluency lost.

    Parameters
    ----------
    replay
        The prompts; what is chosen is best for their mean.
    ids
        The tokens that begin the concept's words (see `loclin.steering.concepts.token_ids`).
    steering
        Makes what steers at a layer's output.
    layers
        Which layers.
    strengths
        Which strengths; those of `STRENGTHS` by default.
    form
        See `Steering.apply`.
    max_kl
        The most mean KL divergence of the next token, in nats.
    progress
        Is told each step.

    Raises
    ------
    OptionError
        When there is nothing to try.

    Notes
    -----
    Cost: for each layer, what makes the steering, and for each strength the layers above.
    """
    strengths = STRENGTHS[form] if strengths is None else strengths
    real("max_kl", max_kl, 0.0)
    for strength in strengths:
        real("strength", strength)
    if not layers or not strengths:
        raise OptionError("a sweep needs at least one layer and one strength")
    trials = []
    for layer in layers:
        progress(f"trying layer {layer}")
        made = steering(layer)
        S = replay.sums(made)
        for strength in tqdm(strengths, desc=f"layer {layer}", unit="strength", delay=2, leave=False, disable=None):
            found = score(replay, ids, replay.log_probs(made, strength, form, S))
            if not found.kl.isfinite().all():
                continue
            trials.append(Trial(layer, float(strength), found.gain.mean().item(), found.kl.mean().item()))
    if not trials:
        raise OptionError("no strength of the sweep leaves the model's values finite; try smaller ones")
    within = [trial for trial in trials if trial.kl <= max_kl]
    best = max(within, key=lambda t: t.gain) if within else min(trials, key=lambda t: t.kl)
    unsteered = replay.unsteered[:, list(ids)].logsumexp(1).mean().item()
    return Sweep(form, trials, best, max_kl, unsteered)


def depths(n_layers: int) -> list[int]:
    """The layers that a sweep tries: at a third, half, two thirds and five sixths of the depth."""
    return sorted({max(0, round(n_layers * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)})


@dataclass(frozen=True)
class Continuation:
    """A text that a model wrote.

    Attributes
    ----------
    text
        What follows the prompt, up to the end of the text if it comes.
    ids
        Its tokens.
    ended
        Whether the model ended it.
    loss
        The unsteered model's mean loss on it, in nats per token; 0 for an empty one.
    repetition
        The share of its three-token sequences that it has said before.
    frequency
        How many of its words are the concept's, per hundred.
    """

    text: str
    ids: list[int]
    ended: bool
    loss: float
    repetition: float
    frequency: float

    __repr__ = brief


@in_plain_torch
@torch.no_grad()
def write(
    model: Model,
    prompts: Sequence[Tensor],
    words: Sequence[str],
    *,
    steering: Steering | None = None,
    strength: float | Sequence[float] = 0.0,
    form: Form = "add",
    max_new_tokens: int = 30,
    seed: int | None = None,
    **options: object,
) -> list[Continuation]:
    """Let a model go on from prompts, steered or not, and measure what it writes.

    Parameters
    ----------
    model
        The model, with a tokenizer.
    prompts
        Token ids `[1, T_b]`.
    words
        The concept's words.
    steering, strength, form
        See `Steering.apply`; one strength, or one for each prompt. None writes unsteered.
    max_new_tokens
        The most tokens.
    seed
        Sample with this seed; None is greedy.
    options
        Further options of `generate`.

    Raises
    ------
    OptionError
        See `check_writing`.
    PromptError
        Where the text would be longer than the model's context.

    Notes
    -----
    Cost: a generation of the whole batch, and one unsteered forward pass over what it gave.
    """
    check_writing(max_new_tokens, seed, options)
    check_room(model, max(prompt.shape[1] for prompt in prompts), max_new_tokens)
    model = model.replicate()
    ids, mask = padded(list(prompts), "left", 0)
    ends = _ends(options["eos_token_id"]) if "eos_token_id" in options else sorted(model.stops)
    settings: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": seed is not None,
        "pad_token_id": ends[0] if ends else 0,
        **options,
    }

    generate: Any = model.hf.generate
    steered = nullcontext() if steering is None else steering.apply(model, strength, form)
    with steered, torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        written = generate(ids, attention_mask=mask.long(), **settings)
    new = written[:, ids.shape[1] :]
    own = torch.ones_like(new, dtype=torch.bool)
    for end in ends:
        own &= (new == end).cumsum(1) == 0
    losses = _losses(model, written, torch.cat([mask.long(), torch.ones_like(new)], 1), new.shape[1], own)
    return [
        _measured(model, prompt[0].tolist(), row[keep].tolist(), bool((~keep).any()), loss, words)
        for prompt, row, keep, loss in zip(prompts, new, own, losses.tolist(), strict=True)
    ]


def check_writing(max_new_tokens: int, seed: int | None, options: Mapping[str, object]) -> None:
    """Refuse what no text can be written with, before any work.

    Raises
    ------
    OptionError
        For fewer than one token, a seed or a temperature that is none, or a temperature without sampling.
    """
    whole("max_new_tokens", max_new_tokens, 1)
    if seed is not None:
        whole("seed", seed, 0, 2**63 - 1)
    if options.get("temperature") is not None:
        real("temperature", options["temperature"], above=0.0)
        if seed is None and not options.get("do_sample"):
            raise OptionError("temperature is for sampling: give a seed, or do_sample=True")


def check_room(model: Model, length: int, max_new_tokens: int) -> None:
    """Refuse a text that would be longer than the model's context: what it writes there is not its own.

    Raises
    ------
    PromptError
        Naming how many tokens it takes.
    """
    limit = model.context_length
    if limit is not None and length + max_new_tokens - 1 > limit:
        raise PromptError(f"{length} tokens and {max_new_tokens} more: {model.info.name} takes at most {limit}")


def _measured(
    model: Model, prompt: list[int], ids: list[int], ended: bool, loss: float, words: Sequence[str]
) -> Continuation:
    text, spoken = (model.tokens.continuation(prompt, ids, special=special) for special in (True, False))
    return Continuation(text, ids, ended, loss, repetition(ids), frequency(spoken, words))


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """The share of n-token sequences that were said before."""
    parts = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def frequency(text: str, words: Sequence[str]) -> float:
    """How many of a text's words are among some words, per hundred."""
    spoken = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text.lower())
    wanted = {word.lower() for word in words}
    return 100 * sum(word in wanted for word in spoken) / len(spoken) if spoken else 0.0


def _ends(end: Any) -> list[int]:
    """The ids that end a text."""
    return [] if end is None else [int(e) for e in end] if isinstance(end, (list, tuple)) else [int(end)]


def _losses(model: Model, written: Tensor, mask: Tensor, n: int, own: Tensor) -> Float[Tensor, " B"]:
    """The unsteered model's mean loss on the last n tokens of each row, where they are the row's own."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    keep = {"logits_to_keep": n + 1} if "logits_to_keep" in inspect.signature(model.hf.forward).parameters else {}
    output = model.hf(written, attention_mask=mask, position_ids=position, use_cache=False, **keep)
    logits = output.logits[:, -n - 1 : -1]
    lost = -torch.log_softmax(logits.float(), -1).gather(2, written[:, -n:, None])[..., 0]
    return (lost * own).sum(1) / own.sum(1).clamp_min(1)
