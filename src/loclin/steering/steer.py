"""One prompt continued twice, unsteered and steered; layer and strength are chosen by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from loclin.common.arguments import real, strings, whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError, PromptError
from loclin.freeze import Gate
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.models.prompts import prompt_warnings
from loclin.network.anatomy import find_anatomy
from loclin.network.points import parse_point
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.serialise import NOT_SAVED
from loclin.steering.base import Steering
from loclin.steering.concepts import packaged_concepts, token_ids
from loclin.steering.form import NEUTRAL, Form
from loclin.steering.methods import METHODS, Method, Source, find_concept_words, make_steering
from loclin.steering.operator import Operator
from loclin.steering.replay import Replay
from loclin.steering.search import MAX_KL, STRENGTHS, Sweep, Trial, depths, score, sweep, trial_table
from loclin.steering.writing import Continuation, check_room, check_writing, encode_prompt, write

REPEATS = 0.3
"""A text repeats itself if a larger fraction of its three-token sequences occurred before."""
_PUBLISHED = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The strengths that a sweep tries with the published operator, which points elsewhere than the hidden states do."""
_TRIED = 30
"""The largest number of tokens that each trial of a sweep writes."""


@dataclass(frozen=True)
class Steered(Result):
    """A prompt continued unsteered and steered; made by `steer`.

    Attributes
    ----------
    prompt, toward, words: the prompt, the texts that it is steered towards, and the concept's words.
    method, layer, strength, form: the steering method, and where and how strongly it is applied.
    normal, steered: the two texts.
    gain, kl: at the prompt's next token, the change of the log-probability of the words, and KL(steered || unsteered),
        in nats.
    sweep: how layer and strength were chosen; None if both were given.
    provenance, settings: model, prompt, gate and precision; and every option.
    warnings: oddities of the tokens of prompt and texts. Also if the steered text says the words no more often than the
        normal one, repeats itself, or exceeds the KL limit.
    steering: the operator or vector, to `save`, or to `apply` elsewhere; None in a result that was loaded.
    """

    prompt: str
    toward: list[str]
    words: list[str]
    method: str
    layer: int
    strength: float
    form: Form
    normal: Continuation
    steered: Continuation
    gain: float
    kl: float
    sweep: Sweep | None
    provenance: Provenance
    settings: dict[str, Any]
    warnings: list[str]
    steering: Steering | None = field(default=None, repr=False, compare=False, metadata=NOT_SAVED)

    def table(self) -> dict[str, list[Any]]:
        """One row per trial of the sweep: layer, strength, gain, KL and the text written."""
        return trial_table([] if self.sweep is None else self.sweep.trials)


@in_plain_torch
@with_progress
def steer(
    model: Model,
    prompt: str,
    toward: Sequence[str] = (),
    *,
    operator: Operator | None = None,
    words: Sequence[str] | None = None,
    method: Method = "operator",
    layer: int | None = None,
    strength: float | None = None,
    form: Form = "add",
    rank: int | None = None,
    normed: bool = False,
    gate: Gate = "activation",
    bos: bool | None = None,
    chat: bool = False,
    max_new_tokens: int = 30,
    max_kl: float = MAX_KL,
    seed: int | None = None,
    memory: int | float | str | None = None,
    progress: Progress = True,
    **options: Any,
) -> Steered:
    """Continue a prompt, unsteered and steered toward some texts, with a model that has a tokenizer.

    Parameters
    ----------
    operator
        A saved operator to steer with. Its own texts and layer then take the place of `toward` and `layer`.
    words
        The concept's words. By default the words of the texts, without function words, and the word that the model
        predicts after each text.
    method
        One of `METHODS`.
    layer
        The layer whose output is steered ("published": its input). None tries several layers (see
        `loclin.steering.search.depths`).
    strength
        Lambda. None tries several strengths, at the next token of this prompt and of packaged neutral prompts. Every
        trial within `max_kl` then continues the prompt. Of the texts that say more of the words than the normal one and
        do not repeat themselves, the one that says most is chosen; of equal texts, the one with the largest gain.
        `Steered.warnings` says if there is no such text.
    form
        See `Steering.apply`.
    rank, normed
        For the operator, see `Operator.make`; the rank of a basis is 8 by default.
    gate, bos, memory
        As for `loclin.linearize`; `bos` applies to the prompt, too.
    chat
        Put the prompt into the tokenizer's chat template, as a user's message.
    max_new_tokens, seed, options
        The length of the texts; greedy, or sampled with a seed; further options of `generate`.
    max_kl
        The largest mean KL divergence that the sweep allows, in nats.
    progress
        True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.

    Raises
    ------
    SteeringError
        When the operator was made with another model or gate split, or the strength makes values infinite or NaN.
    OptionError, PromptError, ModelError
        For options that do not fit together, nothing to steer towards, or a model without tokenizer or chat template.

    Notes
    -----
    Cost: for each layer tried, the map up to it (d columns), one pass through the layers above it for each strength,
    and one batched generation of at most 30 tokens; then two generations.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r}: choose {', '.join(METHODS)}")
    check_writing(max_new_tokens, seed, options)
    tell = steps(progress)
    model = model.replicate()
    n_layers = len(find_anatomy(model.hf).layers)
    if operator is not None:
        operator.check(model, gate)
        toward = [model.decode(source["provenance"]["token_ids"], special=False) for source in operator.sources]
        layer = parse_point(operator.point, n_layers).layer
        method = "published" if operator.published else "operator"
    toward, words = strings("toward", toward), None if words is None else strings("words", words)
    layer = None if layer is None else whole("layer", layer)
    strength = None if strength is None else real("strength", strength)
    rank = None if rank is None else whole("rank", rank, 1)
    seed = None if seed is None else whole("seed", seed)
    max_new_tokens, max_kl = whole("max_new_tokens", max_new_tokens, 1), real("max_kl", max_kl, 0.0)
    options |= {"max_new_tokens": max_new_tokens, "seed": seed}
    if not toward:
        raise PromptError("nothing to steer towards: give a text, or a saved operator")
    ids = encode_prompt(model, prompt, chat, bos)
    warnings = prompt_warnings(model, ids, appends=bos is None and not chat)
    check_room(model, ids.shape[1], max_new_tokens)
    tell("reading the texts")
    lins = [] if operator else [Linearized.at(model, text, gate=gate, bos=bos, memory=memory) for text in toward]
    warnings += [text for lin in lins for text in lin.prompt_warnings]
    chosen = list(words or find_concept_words(toward, lins))
    source = Source(model, method, lins, toward, token_ids(model, chosen), rank, normed, bos)
    make = cache(lambda where: operator or make_steering(source, where))

    def write_steered(where: int, strengths: list[float], at_most: int = max_new_tokens) -> list[Continuation]:
        made = {"steering": make(where), "strength": strengths, "form": form, "max_new_tokens": at_most}
        return write(model, [ids] * len(strengths), chosen, **options | made)

    def write_trials(where: int, strengths: list[float]) -> list[Continuation]:
        tell(f"writing with layer {where}")
        return write_steered(where, strengths, min(max_new_tokens, _TRIED))

    tell("writing the normal text")
    (normal,) = write(model, [ids], chosen, **options)
    found = None
    if layer is None or strength is None:
        tried = _PUBLISHED if (method, form) == ("published", "add") else STRENGTHS[form]
        neutral = [encode_prompt(model, text, chat, bos) for text in packaged_concepts().choosing]
        tell("the unsteered model at the prompt and at neutral ones")
        replay, layers = Replay(model, [ids, *neutral]), depths(n_layers) if layer is None else [layer]
        strengths = tried if strength is None else [strength]
        swept = sweep(replay, source.ids, make, layers, strengths=strengths, form=form, max_kl=max_kl, progress=tell)
        found = _choose(swept, normal, write_trials)
        layer, strength = found.best.layer, found.best.strength
    assert layer is not None
    assert strength is not None
    tell(f"writing the steered text: layer {layer}, strength {strength:g}")
    (steered,) = write_steered(layer, [strength])
    tell("the next token, normal and steered")
    replay, steering = Replay(model, [ids]), make(layer)
    if strength == NEUTRAL[form]:  # the model is unchanged: exactly, also where the formula would round
        next_token = score(replay.unsteered, source.ids, replay.unsteered)
    else:
        next_token = score(replay.unsteered, source.ids, replay.log_probs(steering, strength, form))
        warnings += _list_warnings(normal, steered, chosen, found)
    return Steered(
        prompt=prompt,
        toward=toward,
        words=chosen,
        method=method,
        layer=parse_point(steering.point, n_layers).layer or 0,
        strength=strength,
        form=form,
        normal=normal,
        steered=steered,
        gain=next_token.gain.item(),
        kl=next_token.kl.item(),
        sweep=found,
        provenance=Provenance.of(
            model, ids[0].tolist(), gate=gate, precision="auto", dtype=model.hf.dtype, source="embed",
            target=steering.point, position=ids.shape[1] - 1, normed=normed,
        ),
        settings={"rank": rank, "normed": normed, "bos": bos, "chat": chat, "max_kl": max_kl, **options},
        warnings=list(dict.fromkeys(warnings)),
        steering=steering,
    )  # fmt: skip


def _choose(
    found: Sweep, normal: Continuation, write_trials: Callable[[int, list[float]], list[Continuation]]
) -> Sweep:
    """Write a text with every trial within the KL limit, and make the one with the best text the best.

    The next token alone does not show what a whole text says, nor whether it degenerates.
    """
    texts: dict[Trial, Continuation] = {}
    for layer in dict.fromkeys(trial.layer for trial in found.within):
        own = [trial for trial in found.within if trial.layer == layer]
        texts |= zip(own, write_trials(layer, [trial.strength for trial in own]), strict=True)
    trials = [replace(trial, written=texts.get(trial)) for trial in found.trials]
    best = max((trial for trial in trials if trial.written is not None), key=lambda trial: _rank(trial, normal))
    return replace(found, trials=trials, best=best)


def repeats(text: Continuation, normal: Continuation) -> bool:
    """Tell whether a text repeats itself, and more than the unsteered one does."""
    return text.repetition > max(REPEATS, normal.repetition)


def _rank(trial: Trial, normal: Continuation) -> tuple[bool, bool, float, float]:
    """Rank a trial: does its text say more of the words, does it not repeat itself, how much does it say; then gain."""
    text = trial.written
    assert text is not None
    bad = repeats(text, normal)
    return text.frequency > normal.frequency, not bad, -text.repetition if bad else text.frequency, trial.gain


def _list_warnings(normal: Continuation, steered: Continuation, words: Sequence[str], sweep: Sweep | None) -> list[str]:
    """List what a reader of the two texts should know."""
    named, found = ", ".join(words), []
    if sweep is not None and sweep.best.kl > sweep.max_kl:
        found.append(
            f"No trial keeps within --max-kl {sweep.max_kl:g}: the one with the smallest KL, {sweep.best.kl:.2g}, was "
            "taken."
        )
    if steered.frequency <= normal.frequency:
        found.append(
            f"The steered text says the words {named} no more often than the normal one: try another --strength, "
            "--layer, --toward or --method."
            if sweep is None
            else f"No setting within --max-kl {sweep.max_kl:g} moved the text towards the words {named}: try "
            f"--max-kl {2 * sweep.max_kl:g}, or another --layer, --toward or --method."
        )
    if repeats(steered, normal):
        found.append("The steered text repeats itself: try a smaller --max-kl, sampling (--seed) or another --method.")
    return found
