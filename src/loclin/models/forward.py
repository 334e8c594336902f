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


def hidden_output(output: Any) -> Any:
    """The hidden state in a module's output: some modules return it alone, some as the first of several."""
    return output if isinstance(output, Tensor) else output[0]


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
    """The model's logits `[V]` at one position; those of classes, which have no position.

    Cost: one forward pass, and one row of the head if the model can.
    """
    given = {**_token_arguments(model, input_ids), **model.inputs}
    takes = inspect.signature(model.hf.forward).parameters
    if model.task == "causal" or "use_cache" in takes:
        given["use_cache"] = False
    if model.task == "classification":
        return model.hf(**given).logits[0]
    at = position - model.encoder_length
    if keeps_logits(model.hf):
        keep = torch.tensor([at], device=input_ids.device)
        return model.hf(**given, logits_to_keep=keep).logits[0, 0]
    return model.hf(**given).logits[0, at]


def _token_arguments(model: Model, input_ids: Tensor) -> dict[str, Any]:
    """The arguments by which a model takes a prompt's tokens."""
    if not model.has_encoder:
        return {"input_ids": input_ids}
    n = model.encoder_length
    return {"decoder_input_ids": input_ids[:, n:], **({"input_ids": input_ids[:, :n]} if n else {})}


def hook_embeddings(model: Model, enter: Callable[[Tensor, slice], None]) -> list[RemovableHandle]:
    """Call `enter` with what the input embeddings give, and to which of the prompt's tokens that belongs.

    An encoder-decoder looks up the tokens of its encoder first, and then those of its decoder.
    """
    hf, n = model.hf, model.encoder_length
    tables = [hf.get_encoder(), hf.get_decoder()] if n else [hf]
    parts = iter([slice(0, n), slice(n, None)] if n else [slice(None)])

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if (part := next(parts, None)) is not None:
            enter(output, part)

    return [table.register_forward_hook(leave) for table in {part.get_input_embeddings() for part in tables}]


def at_all_tokens(model: Model, hidden: Tensor) -> Tensor:
    """What an encoder-decoder's decoder gives, `[1, T, d]`, with zeros at the tokens of the encoder."""
    return nn.functional.pad(hidden, (0, 0, model.encoder_length, 0)) if model.encoder_length else hidden
