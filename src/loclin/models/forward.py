"""Running a model's forward pass with hooks on it: where its hidden state is, and one row of its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from loclin.models.model import Model


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again at the end of a `with`, also after an error, and if putting on a later one fails."""
    attached: list[RemovableHandle] = []
    try:
        for handle in handles:
            attached.append(handle)  # known before the next one, which may fail
        yield
    finally:
        for handle in attached:
            handle.remove()


Rows = Callable[[Tensor], Tensor]
"""The rows `[n, T, d]` of a prompt's tokens in a tensor: a view."""


def find_rows(ids: Tensor, prompt: Tensor) -> Rows:
    """Find where the tokens of a prompt `[1, T]` are in what the embeddings return for some ids.

    Models look up ids `[n, T]` or `[T, n]`, and put ids of their own in front of a prompt or behind it.
    """
    length = prompt.shape[1]
    here: tuple[Rows, ...] = (
        lambda values: values[:, :length],
        lambda values: values[:, -length:],
        lambda values: values.transpose(0, 1),
    )
    found = (rows for rows in here if (at := rows(ids)).shape[1:] == (length,) and bool((at == prompt).all()))
    return next(found, lambda values: values)


def with_rows(values: Tensor, rows: Rows, tokens: Tensor) -> Tensor:
    """A copy of what the embeddings return, with other vectors at a prompt's tokens."""
    values = values.clone()
    rows(values).copy_(tokens)
    return values


def hidden_output(output: Any) -> Any:
    """The hidden state in a module's output: some modules return it alone, some as the first of several.

    A decoder that predicts several tokens at once returns a stream for each, one behind the other: the head reads them.
    """
    streams = getattr(output, "last_hidden_state_ngram", None)
    return output if isinstance(output, Tensor) else output[0] if streams is None else streams


def with_hidden_output(output: Any, hidden: Tensor) -> Any:
    """A module's output with another hidden state in it; for a forward hook to return."""
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state in a block's arguments: the first of them."""
    return args[0] if args else kwargs.get("hidden_states")


def with_hidden_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another hidden state in them; for a forward pre-hook to return."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def keeps_logits(hf: nn.Module) -> bool:
    """Whether a model takes `logits_to_keep`, and so can apply its output head to some positions only."""
    return "logits_to_keep" in inspect.signature(hf.forward).parameters


def logits_at(model: Model, input_ids: Tensor, position: int) -> Tensor:
    """The model's logits `[V]` at one position. Cost: one forward pass, and one row of the head if the model can."""
    if keeps_logits(model.hf):
        keep = torch.tensor([position], device=input_ids.device)
        return model.hf(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits[0, 0]
    return model.hf(input_ids=input_ids, use_cache=False).logits[0, position]
