"""The untouched model at inputs near a prompt: other tokens, or other vectors entering layer 0."""

from __future__ import annotations

import inspect
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
from loclin.models.replica import exclusive
from loclin.network.route import first, hidden_state

_TOKENS = 2048
"""Tokens of one forward pass: enough for the full speed of its products."""


@dataclass(frozen=True)
class Outputs:
    """What the untouched model made of n inputs, at one position.

    `embeddings` `[n, T, d]` is what entered layer 0, `final` `[n, d]` the final hidden state, `logits` `[n, V]`.
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
    """Runs a linearized prompt's own model, as it was, on inputs near the prompt.

    Parameters
    ----------
    lin
        The linearized prompt.
    position
        Where the outputs are taken. Negative ones count from the end of each input.
    """

    def __init__(self, lin: Linearized, position: int = -1) -> None:
        self._trace, self._hf, self._ids = lin.trace, lin.trace.model.hf, lin.input_ids
        self._position = position
        route, call = lin.trace.route, lin.trace.layers[0]
        self._exit = route.exit
        self._block = None if route.whole is not None else call.block.module
        self._dtype = call.hidden.dtype
        self._keeps = "logits_to_keep" in inspect.signature(self._hf.forward).parameters

    @in_plain_torch
    def tokens(self, ids: Int[Tensor, "n T"]) -> Outputs:
        """Run other prompts, all of one length that need not be the prompt's own. Cost: n forward passes."""
        return _joined(self._run(part, None) for part in ids.split(_rows(ids.shape[1])))

    def embeddings(self, X: Float[Tensor, "n T d"]) -> Outputs:
        """Run the prompt with other vectors entering layer 0; differentiable where X asks for it.

        At the prompt's own vectors, one at a time, the outputs are those of the model bit for bit. Positions, masks and
        all else that a model makes of the token ids are the prompt's own. Cost: n forward passes.
        """
        parts = X.to(self._dtype).split(_rows(X.shape[1]))
        return _joined(self._run(self._ids.expand(len(part), -1), part) for part in parts)

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
            self._hooks(entering) as seen,
        ):
            logits = self._hf(input_ids=ids, use_cache=False, **keep).logits
        at = 0 if self._keeps else self._position
        return Outputs(seen["embeddings"], seen["final"][:, self._position], logits[:, at])

    @contextmanager
    def _hooks(self, entering: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """Note what enters layer 0, or put something else there; note what leaves the final norm."""
        seen: dict[str, Tensor] = {}

        def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "embeddings" in seen:  # a block that is called again further on
                return None
            seen["embeddings"] = hidden_state(args, kwargs) if entering is None else entering
            if entering is None:
                return None
            return ((entering, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entering})

        def embedded(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if "embeddings" in seen:
                return None
            seen["embeddings"] = output if entering is None else entering
            return entering

        def left(_module: nn.Module, _args: Any, output: Any) -> None:
            seen["final"] = first(output)

        handles = [self._exit.register_forward_hook(left)]
        if self._block is None:
            handles.append(self._hf.get_input_embeddings().register_forward_hook(embedded))
        else:
            handles.append(self._block.register_forward_pre_hook(entered, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _rows(length: int) -> int:
    return max(1, _TOKENS // length)


def _joined(parts: Iterator[Outputs]) -> Outputs:
    found = list(parts)
    if len(found) == 1:
        return found[0]
    return Outputs(*(torch.cat([getattr(part, name) for part in found]) for name in ("embeddings", "final", "logits")))
