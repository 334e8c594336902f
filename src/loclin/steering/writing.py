"""Texts that a model writes, steered or not, and how they are measured: concept words, loss, repetition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loclin.common.arguments import real, whole
from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError, PromptError
from loclin.models import Model
from loclin.models.chat import encode_chat
from loclin.models.encoding import pad_prompts
from loclin.models.forward import keeps_logits
from loclin.steering.base import Steering
from loclin.steering.form import Form


@dataclass(frozen=True)
class Continuation:
    """A text that a model wrote."""

    text: str  # what follows the prompt, up to and including the end-of-text token if the model writes one
    ids: list[int]
    ended: bool  # by the model
    loss: float  # the unsteered model's mean loss on the text, in nats per token; 0 for an empty text
    repetition: float  # the fraction of its three-token sequences that occurred before in the text
    frequency: float  # how many of its words are words of the concept, per hundred

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
    """Continue prompts `[1, T_b]`, steered or not, and measure the texts by the concept's words.

    Steering, strength and form are as for `Steering.apply`. A seed samples, None is greedy; further options are for
    `generate`. Cost: one generation of the whole batch, and one unsteered forward pass over the texts.
    """
    check_writing(max_new_tokens, seed, options)
    check_room(model, max(prompt.shape[1] for prompt in prompts), max_new_tokens)
    model = model.replicate()
    ids, mask = pad_prompts(list(prompts), "left", 0)
    ends = _list_ids(options["eos_token_id"]) if "eos_token_id" in options else sorted(model.stops)
    settings: dict[str, object] = {"do_sample": seed is not None, "pad_token_id": ends[0] if ends else 0, **options}
    generate: Any = model.hf.generate
    steered = nullcontext() if steering is None else steering.apply(model, strength, form)
    with steered, torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        written = generate(ids, attention_mask=mask.long(), max_new_tokens=max_new_tokens, **settings)
    new = written[:, ids.shape[1] :]
    own = torch.ones_like(new, dtype=torch.bool)  # False from the end-of-text token on
    for end in ends:
        own &= (new == end).cumsum(1) == 0
    losses = _measure_loss(model, written, torch.cat([mask.long(), torch.ones_like(new)], 1), own)
    return [
        _measure(model, prompt[0].tolist(), row[keep].tolist(), bool((~keep).any()), loss, words)
        for prompt, row, keep, loss in zip(prompts, new, own, losses.tolist(), strict=True)
    ]


def check_writing(max_new_tokens: int, seed: int | None, options: Mapping[str, object]) -> None:
    """Refuse impossible options of `write` before any work."""
    whole("max_new_tokens", max_new_tokens, 1)
    if seed is not None:
        whole("seed", seed, 0, 2**63 - 1)
    if options.get("temperature") is not None:
        real("temperature", options["temperature"], above=0.0)
        if seed is None and not options.get("do_sample"):
            raise OptionError("temperature is for sampling: give a seed, or do_sample=True")


def check_room(model: Model, length: int, max_new_tokens: int) -> None:
    """Refuse a text that would be longer than the model's context."""
    limit = model.context_length
    if limit is not None and length + max_new_tokens - 1 > limit:
        raise PromptError(
            f"{length} tokens and {max_new_tokens} more: {model.info.name} takes at most {limit}; write fewer tokens, "
            "or shorten the prompt"
        )


def encode_prompt(model: Model, prompt: str, chat: bool, bos: bool | None) -> Int[Tensor, "1 T"]:
    """Encode a prompt; if `chat`, as a user's message (see `loclin.models.chat.encode_chat`)."""
    return encode_chat(model, [{"role": "user", "content": prompt}], bos) if chat else model.encode(prompt, bos=bos)


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """Return the fraction of n-token sequences that occurred before."""
    parts = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def frequency(text: str, words: Sequence[str]) -> float:
    """Count how many of a text's words are among some words, per hundred."""
    spoken = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text.lower())
    wanted = {word.lower() for word in words}
    return 100 * sum(word in wanted for word in spoken) / len(spoken) if spoken else 0.0


def _measure(
    model: Model, prompt: list[int], ids: list[int], ended: bool, loss: float, words: Sequence[str]
) -> Continuation:
    text, spoken = (model.tokens.continuation(prompt, ids, special=special) for special in (True, False))
    return Continuation(text, ids, ended, loss, repetition(ids), frequency(spoken, words))


def _list_ids(end: Any) -> list[int]:
    """List the ids of `generate`'s option `eos_token_id`: None, one id, or several."""
    return [] if end is None else [int(e) for e in end] if isinstance(end, (list, tuple)) else [int(end)]


def _measure_loss(
    model: Model, written: Int[Tensor, "B t"], mask: Int[Tensor, "B t"], own: Bool[Tensor, "B n"]
) -> Float[Tensor, " B"]:
    """Compute the unsteered model's mean loss on the last n tokens of each row, where `own` is True."""
    n = own.shape[1]
    position = (mask.cumsum(1) - 1).clamp_min(0)
    keep = {"logits_to_keep": n + 1} if keeps_logits(model.hf) else {}
    output = model.hf(written, attention_mask=mask, position_ids=position, use_cache=False, **keep)
    logits = output.logits[:, -n - 1 : -1]  # the logits at a token predict the next one
    lost = -torch.log_softmax(logits.float(), -1).gather(2, written[:, -n:, None])[..., 0]
    return (lost * own).sum(1) / own.sum(1).clamp_min(1)
