"""One prompt, normal and steered side by side, with a strength and a layer that were found by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from loclin.analyses.steering import MAX_KL, STRENGTHS, Continuation, Sweep, Trial, depths, score, sweep, write
from loclin.arguments import real, strings, whole
from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import Gate
from loclin.linearization import Linearization, linearize
from loclin.models import Model
from loclin.models.layout import anatomy
from loclin.points import parse
from loclin.prompts import prompt_warnings
from loclin.results import versions
from loclin.steering.base import NEUTRAL, Steering
from loclin.steering.concepts import packaged_concepts, token_ids, words_of
from loclin.steering.hooks import Form
from loclin.steering.operator import Operator, merge
from loclin.steering.replay import Replay
from loclin.steering.vector import activation_addition, mean_difference, output_basis, pullback, random_direction
from loclin.surroundings import in_plain_torch

Method = Literal["operator", "basis", "suffix", "activation", "mean", "random"]
METHODS: dict[Method, str] = {
    "operator": "the text's map, applied to the new tokens (the paper's)",
    "basis": "the text's hidden state in the largest output directions of its map",
    "suffix": "the map from the layer to the logits, transposed, at the words",
    "activation": "the text's hidden state at its last token",
    "mean": "the mean hidden state of the texts less that of neutral ones",
    "random": "a random direction of the same norm",
}
"""What `steer` can steer with."""
REPEATS = 0.3
"""A text of which more three-token sequences than this were said before repeats itself."""
_WRITTEN = 16
"""How many settings of a sweep are tried in writing."""


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
        What a reader should know of the prompt's and the texts' tokens.
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
    progress: Callable[[str], None] = lambda _step: None,
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
        The layer whose output is steered; None tries some (see `loclin.analyses.steering.depths`).
    strength
        Lambda; None tries some, over this prompt and packaged neutral ones. The largest gain is taken within `max_kl`
        whose text does not repeat itself.
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
    Cost: for each layer tried, the map up to it, d columns; two generations, and up to sixteen more where the settings
    that gain most make a text that repeats itself.
    """
    if method not in get_args(Method):
        raise OptionError(f"method={method!r}: choose {', '.join(get_args(Method))}")
    model = model.replicate()
    if operator is not None:
        operator.check(model, gate)
        toward = [model.decode(source["provenance"]["token_ids"], special=False) for source in operator.sources]
        layer, method = parse(operator.point, len(anatomy(model.hf).layers)).layer, "operator"
    toward, words = strings("toward", toward), None if words is None else strings("words", words)
    layer = None if layer is None else whole("layer", layer)
    strength = None if strength is None else real("strength", strength)
    rank, seed = (None if one is None else whole(name, one) for name, one in (("rank", rank), ("seed", seed)))
    max_new_tokens, max_kl = whole("max_new_tokens", max_new_tokens), real("max_kl", max_kl)
    if not toward:
        raise PromptError("nothing to steer towards: give a text, or a saved operator")
    ids = encoded(model, prompt, chat, bos)
    odd = prompt_warnings(model, ids, appends=bos is None and not chat)
    progress("reading the texts")
    lins = [] if operator else [linearize(model, text, gate=gate, bos=bos, memory=memory) for text in toward]
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
        replay = Replay(model, [ids, *others])
        found = sweep(
            replay,
            targets,
            at,
            depths(len(anatomy(model.hf).layers)) if layer is None else [layer],
            strengths=STRENGTHS[form] if strength is None else [strength],
            form=form,
            max_kl=max_kl,
            progress=progress,
        )
    progress("writing")
    options |= {"max_new_tokens": max_new_tokens, "seed": seed}
    (normal,) = write(model, [ids], chosen, **options)

    def written(where: int, how: float) -> Continuation:
        return write(model, [ids], chosen, steering=at(where), strength=how, form=form, **options)[0]

    steered = None
    if found is not None:
        # Next tokens do not tell whether a whole text breaks down.
        tried: list[tuple[Trial, Continuation]] = []
        for trial in found.ranked()[:_WRITTEN]:
            tried.append((trial, written(trial.layer, trial.strength)))
            if not repeats(tried[-1][1], normal):
                break
        else:
            tried.sort(key=lambda pair: pair[1].repetition)
            tried.append(tried[0])
        fluent, steered = tried[-1]
        found = replace(found, best=fluent)
        layer, strength = fluent.layer, fluent.strength
    assert layer is not None
    assert strength is not None
    steering, steered = at(layer), steered or written(layer, strength)
    alone = Replay(model, [ids])
    # what leaves the model as it is has no arithmetic to be judged by
    moved = alone.unsteered if strength == NEUTRAL[form] else alone.log_probs(steering, strength, form)
    judged = score(alone, targets, moved)
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
        warnings=list(dict.fromkeys([*odd, *(text for lin in lins for text in lin.prompt_warnings)])),
    )  # fmt: skip
    return report, steering


def repeats(text: Continuation, normal: Continuation) -> bool:
    """Whether a text says the same again and again, and more than the unsteered one does."""
    return text.repetition > max(REPEATS, normal.repetition)


def _made(
    model: Model,
    method: Method,
    lins: Sequence[Linearization],
    toward: list[str],
    layer: int,
    ids: list[int],
    rank: int | None,
    normed: bool,
    bos: bool | None,
) -> Steering:
    """What a method steers with at one layer."""
    point = f"resid_post.{layer}"
    if method == "operator":
        return merge([Operator.make(lin, layer, rank=rank, normed=normed) for lin in lins])
    if method == "mean":
        return mean_difference(model, toward, packaged_concepts().neutral, point, bos=bos)
    if method == "random":
        return random_direction(model, point)
    if len(lins) > 1:
        raise OptionError(f"method={method!r} takes one text; 'operator' and 'mean' take several")
    if method == "basis":
        return output_basis(lins[0], point, rank or 8)
    return pullback(lins[0], point, ids) if method == "suffix" else activation_addition(lins[0], point)


def concept_words(toward: Sequence[str], lins: Sequence[Linearization]) -> list[str]:
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
