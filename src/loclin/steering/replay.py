"""Prompts run once, and run again from a layer on with other hidden states there: what a sweep needs, and no more."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.surroundings import in_plain_torch
from loclin.models import Model
from loclin.models.padding import padded
from loclin.network.anatomy import anatomy
from loclin.network.route import first, hidden_state
from loclin.steering.base import Steering, site
from loclin.steering.form import Form, steered


class Replay:
    """A batch of prompts, read by a model once.

    The layers below the one that is steered are not run again. Memory: L B T d numbers.

    Parameters
    ----------
    model
        The model.
    prompts
        Token ids `[1, T_b]` of each prompt.
    """

    @in_plain_torch
    def __init__(self, model: Model, prompts: Sequence[Tensor]) -> None:
        self.model = model.replicate()
        self._layers = anatomy(self.model.hf).layers
        self._ids, mask = padded(list(prompts), "left", 0)
        self._mask, self._real = mask.long(), mask
        self._entered: list[Tensor] = []
        self._plain = True
        self.unsteered = self._read()

    @torch.no_grad()
    def _read(self) -> Float[Tensor, "B V"]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered.append(hidden_state(args, kwargs))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self._plain = isinstance(output, Tensor)
            self._entered.append(first(output))

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self._layers]
        handles.append(self._layers[-1].register_forward_hook(leave))
        try:
            return self._log_probs()
        finally:
            for handle in handles:
                handle.remove()

    @property
    def tokens(self) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """All tokens' embeddings, one prompt after the other, and their positions in their prompts."""
        return self._entered[0][self._real], (self._real.long().cumsum(1) - 1)[self._real]

    @in_plain_torch
    def sums(self, steering: Steering) -> Float[Tensor, "B T d"]:
        """S at every position of every prompt; zero at padding. Cost: the operator's products for every token."""
        found = steering.to(self.model.device).push(*self.tokens)
        S = found.new_zeros((*self._real.shape, found.shape[-1]))
        S[self._real] = found
        return S.cumsum(1) if steering.accumulates else S

    def hidden(self, point: str) -> Float[Tensor, "B T d"]:
        """The hidden states at `resid_pre.L` or `resid_post.L`, padding included."""
        return self._entered[self._node(point)]

    def rows(self, point: str) -> list[Tensor]:
        """The hidden states of each prompt `[T_b, d]`, without padding."""
        return [hidden[own] for hidden, own in zip(self.hidden(point), self._real, strict=True)]

    @in_plain_torch
    @torch.no_grad()
    def log_probs(
        self, steering: Steering, strength: float, form: Form = "add", S: Tensor | None = None
    ) -> Float[Tensor, "B V"]:
        """The steered model's log-probabilities of the next token, as `Steering.apply` gives them.

        Cost: the layers above the steered one. S may be given where it is known from `sums`.
        """
        h = self.hidden(steering.point)
        new = steered(h, self.sums(steering) if S is None else S, strength, form)
        moved = self._real & (self._real.cumsum(1) > 1) if steering.spare_first else self._real
        new = torch.where(moved.unsqueeze(-1), new, h)
        node = self._node(steering.point)
        with self._starting_at(node, new):
            return self._log_probs()

    def _node(self, point: str) -> int:
        where = site(self.model, point)
        assert where.layer is not None
        return where.layer + (where.kind == "resid_post")

    @contextmanager
    def _starting_at(self, node: int, hidden: Tensor) -> Iterator[None]:
        """Let the layers below a node give these hidden states, without running."""
        skipped = self._layers[:node]
        before = [vars(layer).get("forward") for layer in skipped]
        handle = None
        if not skipped:
            handle = self._layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs: (
                    ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
                ),
                with_kwargs=True,
            )
        try:
            for layer in skipped:
                layer.forward = lambda *_args, **_kwargs: hidden if self._plain else (hidden,)  # type: ignore[method-assign]
            yield
        finally:
            if handle is not None:
                handle.remove()
            for layer, forward in zip(skipped, before, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = forward  # type: ignore[method-assign]

    def _log_probs(self) -> Float[Tensor, "B V"]:
        hf = self.model.hf
        known = inspect.signature(hf.forward).parameters
        options: dict[str, Any] = {"position_ids": (self._mask.cumsum(1) - 1).clamp_min(0), "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in known}
        output = hf(input_ids=self._ids, attention_mask=self._mask, use_cache=False, **options)
        return torch.log_softmax(output.logits[:, -1].float(), dim=-1)
