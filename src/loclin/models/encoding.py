"""From a prompt to token ids, with or without a beginning-of-text token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loclin.common.arguments import text
from loclin.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Look up one token by its text; None when the vocabulary does not have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    # Unknown tokens come back as the id of the unknown token, so the way back must lead to the same text.
    if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token:
        return found
    return None


def beginning_token(tokenizer: PreTrainedTokenizerBase | None, named: str | None = None) -> int | None:
    """Choose the beginning-of-text token: the named one, else the tokenizer's, else its end-of-text token."""
    if tokenizer is None:
        return None
    for token in (named, tokenizer.bos_token, tokenizer.eos_token):
        if token is not None and (found := token_id(tokenizer, str(token))) is not None:
            return found
    return None


def appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts behind every text by itself, such as `</s>` or `[SEP]`."""
    plain, ids = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next((i for i in range(len(ids)) if plain and ids[i : i + len(plain)] == plain), len(ids))
    return list(ids[start + len(plain) :])


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, bos: bool | str | None, default_bos: int | None
) -> list[int]:
    """Turn a prompt into token ids.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    prompt
        The text.
    bos
        None: what the tokenizer does by itself. True: a beginning token in front. False: none. A string: that
        token in front. A token that already begins the text is never doubled. What a tokenizer puts behind the text,
        such as `</s>`, is left out: a model goes on from the text, not from its end.
    default_bos
        What `True` puts in front.

    Raises
    ------
    PromptError
        When the prompt has no tokens, or there is no such beginning token.
    """
    text("The prompt", prompt)
    plain: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not plain:
        raise PromptError(f"The prompt {prompt!r} has no tokens.")
    if bos is False:
        return plain
    if bos is None:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        behind = appended(tokenizer)
        ids = ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids
        written = ids[1:] == plain and ids[0] == plain[0] and ids[0] in tokenizer.all_special_ids
        return plain if written else ids
    start = default_bos if bos is True else token_id(tokenizer, bos)
    if start is None:
        what = "names no beginning-of-text token" if bos is True else f"does not know the token {bos!r}"
        raise PromptError(f"The tokenizer {what}; pass bos='<token>' with one of its vocabulary.")
    return plain if plain[0] == start else [start, *plain]
