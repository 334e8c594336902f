"""Running a model's forward pass with hooks on it: where its hidden state is, and one row of its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.errors import ModelError
from loclin.models.placeholders import SOFT, enters_decoder, token_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def all_rows(values: Tensor) -> Tensor:
    """All rows, where a tensor has one for each token."""
    return values


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
    return next(found, all_rows)


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
    if isinstance(output, dict):  # transformers' outputs, of which a model asks parts by name
        return type(output)(**{**output, next(iter(output)): hidden})
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


def logits_at(model: Model, input_ids: Tensor, at: int | list[int]) -> Tensor:
    """The model's logits `[V]` at one position, or `[n, V]` at several; those of classes, which have no position.

    Cost: one forward pass, and these rows of the head if the model can.
    """
    if model.task == "classification":
        return run(model, input_ids).logits[0]
    rows = torch.tensor(at, device=input_ids.device).reshape(-1) - model.encoder_length
    if keeps_logits(model.hf):
        logits = run(model, input_ids, logits_to_keep=rows).logits[0]
    else:
        logits = run(model, input_ids).logits[0, rows]
    return logits[0] if isinstance(at, int) else logits


def run(model: Model, input_ids: Tensor, **more: Any) -> Any:
    """Run a model on a prompt's tokens, those of an encoder and those of a decoder, and on its other inputs."""
    n, takes = model.encoder_length, inspect.signature(model.hf.forward).parameters
    given: dict[str, Any] = {"input_ids": input_ids}
    if SOFT in model.inputs:
        vectors, table = model.inputs[SOFT], model.hf.get_input_embeddings()
        more = {SOFT: torch.cat([vectors, table(input_ids[:, vectors.shape[1] :])], dim=1), **more}
        given = {}
    elif n:
        given = {"input_ids": input_ids[:, :n], "decoder_input_ids": input_ids[:, n:]}
    elif model.has_encoder and model.hf.main_input_name in model.inputs:
        given = {"decoder_input_ids": input_ids}
    if model.task == "causal" or "use_cache" in takes:
        given["use_cache"] = False
    return model.hf(**{**given, **token_types(model, input_ids), **model.inputs, **more})


def hook_embeddings(
    model: Model, input_ids: Tensor, decoder: nn.Module, enter: Callable[[Tensor, Rows, slice], None]
) -> list[RemovableHandle]:
    """Call `enter` with what the input embeddings give for a prompt, its rows there, and the tokens of these rows.

    An encoder-decoder looks up the tokens of its encoder first, and then those of its decoder. Where vectors stand in
    the place of tokens, they are what the decoder is given.
    """
    n, length = model.encoder_length, input_ids.shape[1]
    if enters_decoder(model):
        return [hook_given(decoder, lambda hidden: enter(hidden, all_rows, slice(0, length)))]
    parts = [slice(0, n), slice(n, length)] if n else [slice(0, length)]

    def leave(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not parts:
            return
        asked = input_ids[:, parts[0]]
        if not n or (args[0].shape[1] >= asked.shape[1] and torch.equal(args[0][:, : asked.shape[1]], asked)):
            enter(output, find_rows(args[0], asked), parts.pop(0))

    return [table.register_forward_hook(leave) for table in embedding_tables(model)]


def hook_given(decoder: nn.Module, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call a function with the vectors that a decoder is given; what it returns takes their place, if anything."""

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if SOFT not in kwargs:
            kind = type(decoder).__name__
            raise ModelError(f"{kind} is not given its embeddings by name: give a prompt of tokens alone", kind)
        changed = change(kwargs[SOFT])
        return None if changed is None else (args, kwargs | {SOFT: changed})

    return decoder.register_forward_pre_hook(entering, with_kwargs=True)


def embedding_tables(model: Model) -> list[nn.Module]:
    """The tables of the input embeddings; an encoder-decoder may have two, with the encoder's first."""
    if not model.encoder_length:
        return [model.hf.get_input_embeddings()]
    return list(dict.fromkeys(_table(part) for part in (model.hf.get_encoder(), model.hf.get_decoder())))


def decoder_table(hf: PreTrainedModel) -> nn.Module:
    """The input embeddings of an encoder-decoder's decoder."""
    return _table(hf.get_decoder())


def _table(part: Any) -> nn.Module:
    return part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else part.embed_tokens


def at_all_tokens(model: Model, hidden: Tensor, length: int) -> Tensor:
    """The final hidden states of a prompt's T tokens, `[1, T, d]`; zeros at those that only an encoder reads.

    More than the decoder's own tokens may be in what it gives: streams of several predictions, or padding.
    """
    before = model.encoder_length
    hidden = hidden[:, : length - before]
    return nn.functional.pad(hidden, (0, 0, before, 0)) if before else hidden
