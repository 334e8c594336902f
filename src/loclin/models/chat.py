"""Chat messages as token ids, by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from loclin.errors import ModelError, PromptError
from loclin.models.model import Model

Messages = Sequence[Mapping[str, Any]]
"""The turns of a chat: each has a `role` (user, assistant, system) and a text as its `content`."""


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of chat messages."""
    several = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    return several and all(isinstance(one, Mapping) and "role" in one for one in prompt)  # type: ignore[attr-defined]


def encode_chat(model: Model, messages: Messages, bos: bool | str | None = None) -> Int[Tensor, "1 T"]:
    """Encode the turns of a chat: the ids of the template, up to where the assistant's next turn begins.

    Where the last turn is the assistant's, the prompt ends within it, so that the model goes on with it. `bos=True`
    puts a beginning token in front unless the template does so already, `bos=False` removes the template's own.

    Raises
    ------
    ModelError
        When the model has no tokenizer or no chat template.
    PromptError
        For a turn without a text, or turns that the template refuses (it says why).
    """
    turns = [{**turn} for turn in messages]
    for number, turn in enumerate(turns):
        if not isinstance(turn.get("content"), str):
            raise PromptError(f"message {number} ({turn['role']!r}) has no text: give it as a string, and images apart")
    ids = model.encode(write_chat(model, model.tokenizer, turns), bos=bos or False)
    return ids[:, 1:] if bos is False and int(ids[0, 0]) == model.bos else ids


def write_chat(model: Model, holder: Any, turns: Messages) -> str:
    """The text of a chat by the template of a tokenizer or of a processor; raises as `encode_chat`."""
    if holder is None or getattr(holder, "chat_template", None) is None:
        raise ModelError(
            f"{model.info.name} has no chat template: leave chat out, or load a model that was trained for chats"
        )
    goes_on = turns[-1]["role"] == "assistant"
    ends: dict[str, Any] = {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
    try:
        return str(holder.apply_chat_template(turns, tokenize=False, **ends))
    except Exception as refused:  # templates are programs, which raise whatever their authors chose
        raise PromptError(f"the chat template of {model.info.name} refuses these messages: {refused}") from refused
