"""Padding: which of a row's tokens are the prompt, and rows of one length out of prompts of several."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loclin.errors import OptionError, PromptError

Padding = Literal["left", "right"]


def without_padding(input_ids: Int[Tensor, "B T"], attention_mask: Tensor) -> list[Tensor]:
    """Each row's own tokens `[1, T_b]`, in order: those where the mask is not zero.

    Raises
    ------
    PromptError
        When a row has no tokens, or padding in between: there is no prompt then that the model reads the same way.
    """
    if attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"the attention mask has the shape {list(attention_mask.shape)}, the token ids {list(input_ids.shape)}"
        )
    rows = []
    for row, mask in zip(input_ids, attention_mask.to(input_ids.device).bool(), strict=True):
        kept = mask.nonzero().flatten().tolist()
        if not kept:
            raise PromptError("the attention mask leaves no token of the prompt")
        if len(kept) != kept[-1] - kept[0] + 1:
            raise PromptError("the attention mask has padding between tokens; it can only be at the ends of a prompt")
        rows.append(row[None, kept[0] : kept[-1] + 1])
    return rows


def padded(prompts: list[Tensor], padding: Padding, fill: int) -> tuple[Tensor, Tensor]:
    """Prompts `[1, T_b]` as the rows of one tensor `[B, T]`, and the mask `[B, T]` of what is not padding.

    Raises
    ------
    OptionError
        When the padding is on no side.
    """
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
