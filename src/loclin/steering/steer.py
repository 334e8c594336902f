"""One prompt, normal and steered side by side, with a strength and a layer that were found by trying."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from loclin.common.arguments import real, strings, whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import Gate
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.models.prompts import prompt_warnings
from loclin.network.anatomy import anatomy
from loclin.network.points import parse
from loclin.results.result import versions
from loclin.steering.base import Steering
from loclin.steering.concepts import packaged_concepts, token_ids, words_of
from loclin.steering.form import NEUTRAL, Form
from loclin.steering.operator import At, Operator, merge
from loclin.steering.replay import Replay
from loclin.steering.search import (
    MAX_KL,
    STRENGTHS,
    Continuation,
    Sweep,
    Trial,
    check_room,
    check_writing,
    depths,
    score,
    sweep,
    write,
)
from loclin.steering.vector import activation_addition, mean_difference, output_basis, pullback, random_direction

Method = Literal["operator", "published", "basis", "suffix", "activation", "mean", "random"]
METHODS: dict[Method, str] = {
    "operator": "the text's map to a layer's output, applied to the new tokens, and added there",
    "published": "that map with the final norm on top, added at the layer's input, as the paper's author does",
    "basis": "the text's hidden state in the largest output directions of its map",
    "suffix": "the map from the layer to the logits, transposed, at the words",
    "activation": "the text's hidden state at its last token",
    "mean": "the mean hidden state of the texts less that of neutral ones",
    "random": "a random direction of the same norm",
}
"""What `steer` can steer with."""
REPEATS = 0.3
"""A text of which more three-token sequences than this were said before repeats itself."""
_PUBLISHED = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The strengths that a sweep tries with the published operator, which is not along the hidden states it is added to."""
_TRIED = 30
"""How many tokens each setting of a sweep writes at most, to be chosen by."""


@dataclass(frozen=True)
class Steered:
    """A prompt, gone on from normally and steered. Made by `steer`.

    Attributes
    ----------
    prompt, toward
        The prompt, and the texts that it is steered towards.
    words
        The words that count as the concept's.
    method, layer, strength, form
        What steered, where and how strongly.
    normal, steered
        The two texts.
    gain, kl
        At the prompt's next token: how much the log-probability of the words rises, and the divergence from the
        unsteered prediction, in nats.
    sweep
        How layer and strength were found; None where both were given.
    model, settings
        Where the model came from, and every option.
    warnings
        What a reader should know of the prompt's and the texts' tokens; and what the steered text is not: nearer to the
        words than the normal one, free of repetition, within the limit.
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
    model: dict[str, Any]
    settings: dict[str, Any]
    warnings: list[str]

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)


@in_plain_torch
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
    progress: Progress = silent,
    **options: Any,
) -> tuple[Steered, Steering]:
    """Go on from a prompt, normally and steered.

    Parameters
    ----------
    model
        The model, with a tokenizer.
    prompt
        What to go on from.
    toward
        The texts that mean the concept, all of one method's maps or states.
    operator
        A saved operator instead; then its texts are those of `toward`, and its layer is the layer.
    words
        The concept's words. By default those of the texts that mean something by themselves, and what the model
        predicts after each text.
    method
        One of `METHODS`.
    layer
        The layer whose output ("published": input) is steered; None tries some (see
        `loclin.steering.search.depths`).
    strength
        Lambda; None tries some, over this prompt and packaged neutral ones. Every setting within `max_kl` goes on from
        the prompt; of the texts that say more of the words than the normal one and do not repeat themselves, the one
        that says most is taken, and of equal ones the one with the largest gain. `Steered.warnings` says when there is
        none.
    form
        See `Steering.apply`.
    rank, normed
        For the operator, see `Operator.make`; the rank of a basis is 8 by default.
    gate, bos, memory
        As for `loclin.linearize`; `bos` is for the prompt too.
    chat
        Put the prompt into the tokenizer's chat template, as a user's message.
    max_new_tokens, seed, options
        How much is written, and how: greedy, or sampled with a seed; further options of `generate`.
    max_kl
        The most mean KL divergence that the sweep allows.
    progress
        Is told each step.

    Returns
    -------
    tuple[Steered, Steering]
        The report, and what steered.

    Raises
    ------
    SteeringError
        When the operator was made with another model or gate split, or the strength drives values out of numbers.
    OptionError, PromptError, ModelError
        For options that do not fit, nothing to steer towards, or a model without tokenizer or chat template.

    Notes
    -----
    Cost: for each layer tried, the map up to it, d columns, the layers above it for each strength, and one generation
    of its strengths in a batch, of at most 30 tokens; and two generations.
    """
    if method not in get_args(Method):
        raise OptionError(f"method={method!r}: choose {', '.join(get_args(Method))}")
    check_writing(max_new_tokens, seed, options)
    model = model.replicate()
    if operator is not None:
        operator.check(model, gate)
        toward = [model.decode(source["provenance"]["token_ids"], special=False) for source in operator.sources]
        layer = parse(operator.point, len(anatomy(model.hf).layers)).layer
        method = "published" if operator.published else "operator"
    toward, words = strings("toward", toward), None if words is None else strings("words", words)
    layer = None if layer is None else whole("layer", layer)
    strength = None if strength is None else real("strength", strength)
    rank = None if rank is None else whole("rank", rank, 1)
    seed = None if seed is None else whole("seed", seed)
    max_new_tokens, max_kl = whole("max_new_tokens", max_new_tokens, 1), real("max_kl", max_kl, 0.0)
    if not toward:
        raise PromptError("nothing to steer towards: give a text, or a saved operator")
    ids = encoded(model, prompt, chat, bos)
    odd = prompt_warnings(model, ids, appends=bos is None and not chat)
    check_room(model, ids.shape[1], max_new_tokens)
    progress("reading the texts")
    lins = [] if operator else [Linearized.at(model, text, gate=gate, bos=bos, memory=memory) for text in toward]
    chosen = list(words or concept_words(toward, lins))
    targets = token_ids(model, chosen)
    others = [encoded(model, text, chat, bos) for text in packaged_concepts().choosing]
    made: dict[int, Steering] = {}

    def at(where: int) -> Steering:
        if where not in made:
            made[where] = operator or _made(model, method, lins, list(toward), where, targets, rank, normed, bos)
        return made[where]

    found, replay = None, None
    if layer is None or strength is None:
        progress("the unsteered model at the prompt and at neutral ones")
        replay = Replay(model, [ids, *others])
        strengths = _PUBLISHED if (method, form) == ("published", "add") else STRENGTHS[form]
        found = sweep(
            replay,
            targets,
            at,
            depths(len(anatomy(model.hf).layers)) if layer is None else [layer],
            strengths=strengths if strength is None else [strength],
            form=form,
            max_kl=max_kl,
            progress=progress,
        )
    progress("writing the normal text")
    options |= {"max_new_tokens": max_new_tokens, "seed": seed}
    (normal,) = write(model, [ids], chosen, **options)

    def written(where: int, strengths: Sequence[float], most: int) -> list[Continuation]:
        short = options | {"max_new_tokens": min(max_new_tokens, most)}
        prompts = [ids] * len(strengths)
        return write(model, prompts, chosen, steering=at(where), strength=strengths, form=form, **short)

    if found is not None:
        # Next tokens do not tell what a whole text says, nor whether it breaks down.
        texts: dict[Trial, Continuation] = {}
        for where in dict.fromkeys(trial.layer for trial in found.within):
            progress(f"writing with layer {where}")
            own = [trial for trial in found.within if trial.layer == where]
            texts |= zip(own, written(where, [trial.strength for trial in own], _TRIED), strict=True)
        trials = [replace(trial, written=texts.get(trial)) for trial in found.trials]
        best = max((trial for trial in trials if trial.written is not None), key=lambda trial: _merit(trial, normal))
        found = replace(found, trials=trials, best=best)
        layer, strength = best.layer, best.strength
    assert layer is not None
    assert strength is not None
    progress(f"writing the steered text: layer {layer}, strength {strength:g}")
    steering = at(layer)
    (steered,) = written(layer, [strength], max_new_tokens)
    progress("the next token, normal and steered")
    alone = Replay(model, [ids])
    # what leaves the model as it is has no arithmetic to be judged by
    moved = alone.unsteered if strength == NEUTRAL[form] else alone.log_probs(steering, strength, form)
    judged = score(alone, targets, moved)
    notes = [] if strength == NEUTRAL[form] else _warnings(normal, steered, chosen, found)
    report = Steered(
        prompt=prompt,
        toward=toward,
        words=chosen,
        method=method,
        layer=parse(steering.point, len(anatomy(model.hf).layers)).layer or 0,
        strength=strength,
        form=form,
        normal=normal,
        steered=steered,
        gain=judged.gain.item(),
        kl=judged.kl.item(),
        sweep=found,
        model=model.info.to_dict(),
        settings={
            "point": steering.point, "rank": rank, "normed": normed, "gate": gate, "bos": bos, "chat": chat,
            "max_kl": max_kl, "token_ids": ids[0].tolist(), "versions": versions(), **options,
        },
        warnings=list(dict.fromkeys([*odd, *(text for lin in lins for text in lin.prompt_warnings), *notes])),
    )  # fmt: skip
    return report, steering


def repeats(text: Continuation, normal: Continuation) -> bool:
    """Whether a text says the same again and again, and more than the unsteered one does."""
    return text.repetition > max(REPEATS, normal.repetition)


def _merit(trial: Trial, normal: Continuation) -> tuple[bool, bool, float, float]:
    """What cells are chosen by: the text says more of the words, does not repeat itself, says most of them; gain."""
    text = trial.written
    assert text is not None
    bad = repeats(text, normal)
    return text.frequency > normal.frequency, not bad, -text.repetition if bad else text.frequency, trial.gain


def _warnings(normal: Continuation, steered: Continuation, words: Sequence[str], sweep: Sweep | None) -> list[str]:
    """What a reader of two texts should know."""
    named, found = ", ".join(words), []
    if sweep is not None and sweep.best.kl > sweep.max_kl:
        found.append(
            f"No setting that was tried keeps within --max-kl {sweep.max_kl:g}; the one with the least KL, "
            f"{sweep.best.kl:.2g}, was taken."
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
        found.append(
            "The steered text repeats itself: a smaller --max-kl, sampling (--seed) or another --method keeps it "
            "fluent."
        )
    return found


def _made(
    model: Model,
    method: Method,
    lins: Sequence[Linearized],
    toward: list[str],
    layer: int,
    ids: list[int],
    rank: int | None,
    normed: bool,
    bos: bool | None,
) -> Steering:
    """What a method steers with at one layer."""
    point = f"resid_post.{layer}"
    if method in ("operator", "published"):
        at: At = "published" if method == "published" else "output"
        return merge([Operator.make(lin, layer, at=at, rank=rank, normed=normed) for lin in lins])
    if method == "mean":
        return mean_difference(model, toward, packaged_concepts().neutral, point, bos=bos)
    if method == "random":
        return random_direction(model, point)
    if len(lins) > 1:
        raise OptionError(f"method={method!r} takes one text; 'operator', 'published' and 'mean' take several")
    if method == "basis":
        return output_basis(lins[0], point, rank or 8)
    return pullback(lins[0], point, ids) if method == "suffix" else activation_addition(lins[0], point)


def concept_words(toward: Sequence[str], lins: Sequence[Linearized]) -> list[str]:
    """The words of some texts, and what the model predicts after each, where that is a word.

    Raises
    ------
    PromptError
        When there are none.
    """
    next_ones = [text.strip() for lin in lins for text, _ in lin.next_tokens(1) if text.startswith(" ")]
    found = list(dict.fromkeys(word for text in (*toward, *next_ones) for word in words_of(text)))
    if not found:
        raise PromptError("the text has no words that mean something by themselves; say which with words=")
    return found


def encoded(model: Model, prompt: str, chat: bool, bos: bool | None) -> Tensor:
    """A prompt's token ids `[1, T]`, in the tokenizer's chat template where asked.

    With a template, `bos=True` puts a beginning token in front unless the template does; `bos=False` takes its away.

    Raises
    ------
    ModelError
        When there is no tokenizer, or it has no chat template.
    """
    if not chat:
        return model.encode(prompt, bos=bos)
    if getattr(model.tokenizer, "chat_template", None) is None or model.tokenizer is None:
        raise ModelError(f"{model.info.name} has no chat template; leave chat out")
    message = [{"role": "user", "content": prompt}]
    text = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = model.encode(str(text), bos=bos or False)
    return ids[:, 1:] if bos is False and int(ids[0, 0]) == model.bos else ids
