"""From prompts to token ids: beginning-of-text tokens, and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loclin.common.arguments import text
from loclin.errors import OptionError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Padding = Literal["left", "right"]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Look up one token by its text; None when the vocabulary does not have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    # Unknown tokens come back as the id of the unknown token, so the way back must lead to the same text.
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token else None


def beginning_token(tokenizer: PreTrainedTokenizerBase | None, named: str | None = None) -> int | None:
    """Choose the beginning-of-text token: the named one, else the tokenizer's, else its end-of-text token."""
    if tokenizer is None:
        return None
    named_ones = (str(token) for token in (named, tokenizer.bos_token, tokenizer.eos_token) if token is not None)
    return next((found for token in named_ones if (found := token_id(tokenizer, token)) is not None), None)


def appended_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer appends to every text by itself, such as `</s>` or `[SEP]`."""
    plain, ids = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next((i for i in range(len(ids)) if plain and ids[i : i + len(plain)] == plain), len(ids))
    return list(ids[start + len(plain) :])


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    bos: bool | str | None,
    default_bos: int | None,
    whole: bool = False,
) -> list[int]:
    """Turn a prompt into token ids; `bos` is that of `Model.encode`, and `default_bos` the token for `True`.

    Tokens that the tokenizer appends, such as `</s>`, are left out: a model continues the text, not its end. `whole`
    keeps them: other tasks read a whole text.
    """
    text("the prompt", prompt)
    plain: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not plain:
        raise PromptError(f"the prompt {prompt!r} has no tokens: give some text")
    if bos is False:
        return plain
    if bos is None:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        if whole:
            return ids
        behind = appended_tokens(tokenizer)
        ids = ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids
        written = ids[1:] == plain and ids[0] == plain[0] and ids[0] in tokenizer.all_special_ids
        return plain if written else ids
    start = default_bos if bos is True else token_id(tokenizer, bos)
    if start is None:
        what = "names no beginning-of-text token" if bos is True else f"does not know the token {bos!r}"
        raise PromptError(f"the tokenizer {what}; pass bos='<token>' with one of its vocabulary")
    return plain if plain[0] == start else [start, *plain]


def refuse_long(length: int, limit: int | None, name: str) -> None:
    """Refuse a prompt of more tokens than a model takes."""
    if limit is not None and length > limit:
        raise PromptError(f"the prompt has {length} tokens; {name} takes at most {limit}: shorten it")


def strip_padding(input_ids: Int[Tensor, "B T"], attention_mask: Tensor) -> list[Tensor]:
    """Strip the padding of each row `[1, T_b]`; between tokens it is refused, since no other prompt is equivalent."""
    if attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"the attention mask has the shape {list(attention_mask.shape)}: give {list(input_ids.shape)}, as the ids"
        )
    rows = []
    for row, mask in zip(input_ids, attention_mask.to(input_ids.device).bool(), strict=True):
        kept = mask.nonzero().flatten().tolist()
        if not kept:
            raise PromptError("the attention mask leaves no token of the prompt: set it to 1 at the prompt's tokens")
        if len(kept) != kept[-1] - kept[0] + 1:
            raise PromptError("the attention mask has padding between tokens: put it at the ends of the prompt")
        rows.append(row[None, kept[0] : kept[-1] + 1])
    return rows


def pad_prompts(prompts: list[Tensor], padding: Padding, fill: int) -> tuple[Tensor, Tensor]:
    """Pad prompts `[1, T_b]` to the rows of one tensor `[B, T]`; also returns the mask `[B, T]` of their tokens."""
    if padding not in ("left", "right"):
        raise OptionError(f"padding={padding!r}: choose left or right")
    shape = len(prompts), max(prompt.shape[1] for prompt in prompts)
    input_ids = torch.full(shape, fill, dtype=torch.long, device=prompts[0].device)
    mask = torch.zeros(shape, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in enumerate(prompts):
        n = prompt.shape[1]
        own = slice(0, n) if padding == "right" else slice(shape[1] - n, shape[1])
        input_ids[row, own], mask[row, own] = prompt[0], True
    return input_ids, mask
