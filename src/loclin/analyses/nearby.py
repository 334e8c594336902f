"""The unmodified model at inputs near a prompt: other tokens, or other vectors at the input of layer 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.brief import brief
from loclin.common.surroundings import eager_code, exact_arithmetic, in_plain_torch
from loclin.maps.linearized import Linearized
from loclin.models.forward import (
    find_rows,
    hidden_input,
    hidden_output,
    hook_given,
    hooked,
    keeps_logits,
    run,
    with_hidden_input,
    with_rows,
)
from loclin.models.placeholders import enters_decoder
from loclin.models.replica import exclusive

_TOKENS = 2048
"""Tokens per forward pass: enough for the full speed of matrix products."""


@dataclass(frozen=True)
class Outputs:
    """The unmodified model's outputs for n inputs, at one position.

    `embeddings` `[n, T, d]` is the input of layer 0, `final` `[n, d]` the final hidden state, `logits` `[n, V]`.
    """

    embeddings: Float[Tensor, "n T d"]
    final: Float[Tensor, "n d"]
    logits: Float[Tensor, "n V"]

    __repr__ = brief

    @property
    def log_probabilities(self) -> Float[Tensor, "n V"]:
        """The logarithms of the next token's probabilities, in float64."""
        return torch.log_softmax(self.logits.double(), dim=-1)


class Nearby:
    """Runs the unmodified model of a linearized prompt on inputs near that prompt.

    A negative position of the outputs counts from the end of each input.
    """

    def __init__(self, lin: Linearized, position: int = -1) -> None:
        self._trace, self._position = lin.trace, position
        # a frozen pass takes more than one as the model runs it
        self._rows = 1 + lin.allowance.spare // max(1, lin.allowance.work)
        if lin.trace.model.inputs:  # which are those of one prompt
            self._rows = 1
        self._hf = lin.trace.model.hf
        self._keeps = keeps_logits(self._hf)

    @in_plain_torch
    def tokens(self, ids: Int[Tensor, "n T"]) -> Outputs:
        """Run other prompts of equal length, which may differ from the prompt's. Cost: n forward passes."""
        return _join(self._run(part, None) for part in ids.split(self._fit_rows(ids.shape[1])))

    def embeddings(self, X: Float[Tensor, "n T d"]) -> Outputs:
        """Run the prompt with other vectors X at the input of layer 0; differentiable if X requires grad.

        At the prompt's own vectors, one input at a time, the outputs are the model's bit for bit. Positions, masks and
        whatever else a model derives from token ids are those of the prompt. Cost: n forward passes.
        """
        parts = X.to(self._trace.layers[0].hidden.dtype).split(self._fit_rows(X.shape[1]))
        return _join(self._run(self._trace.input_ids.expand(len(part), -1), part) for part in parts)

    def _fit_rows(self, length: int) -> int:
        return max(1, min(self._rows, _TOKENS // length))

    def _run(self, ids: Tensor, entering: Tensor | None) -> Outputs:
        keep: dict[str, Any] = {}
        if self._keeps:
            keep["logits_to_keep"] = torch.tensor([self._position % ids.shape[1]], device=ids.device)
        self._trace.check_weights(self._hf)
        with (
            exclusive(self._hf),
            exact_arithmetic(),
            eager_code(),
            torch.set_grad_enabled(entering is not None and entering.requires_grad),
            self._hooks(ids, entering) as seen,
        ):
            logits = run(self._trace.model, ids, **keep).logits
        at = 0 if self._keeps else self._position
        return Outputs(seen["embeddings"], seen["final"][:, self._position], logits[:, at])

    @contextmanager
    def _hooks(self, ids: Tensor, entering: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """Record the input of layer 0, or replace it; record the output of the final norm."""
        seen: dict[str, Tensor] = {}

        def replace_hidden(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "embeddings" in seen:  # a block that is called more than once
                return None
            seen["embeddings"] = hidden_input(args, kwargs) if entering is None else entering
            return None if entering is None else with_hidden_input(args, kwargs, entering)

        def replace_embeddings(_module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if "embeddings" in seen:
                return None
            rows = find_rows(args[0], ids)
            seen["embeddings"] = rows(output) if entering is None else entering
            return None if entering is None else with_rows(output, rows, entering)

        def replace_given(hidden: Tensor) -> Tensor | None:
            seen["embeddings"] = hidden if entering is None else entering
            return entering

        def note_final(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["final"] = hidden_output(output)[:, : ids.shape[1]]

        route = self._trace.sequence
        if route.fallback_reason is None:
            block = self._trace.layers[0].block.module
            handle = block.register_forward_pre_hook(replace_hidden, with_kwargs=True)
        elif enters_decoder(self._trace.model):
            handle = hook_given(route.exit, replace_given)
        else:
            handle = self._hf.get_input_embeddings().register_forward_hook(replace_embeddings)
        with hooked([route.exit.register_forward_hook(note_final), handle]):
            yield seen


def _join(parts: Iterator[Outputs]) -> Outputs:
    found = list(parts)
    if len(found) == 1:
        return found[0]
    return Outputs(*(torch.cat([getattr(part, name) for part in found]) for name in ("embeddings", "final", "logits")))
