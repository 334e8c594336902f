"""Prompts that run once, and then again from a layer on with other hidden states: for sweeps over strengths."""

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
from loclin.models.encoding import pad_prompts
from loclin.models.forward import hidden_input, hidden_output, hooked, with_hidden_input
from loclin.network.anatomy import find_anatomy
from loclin.steering.base import Steering, site
from loclin.steering.form import Form, move_towards


class Replay:
    """A batch of prompts `[1, T_b]` whose lower layers run once. Memory: the L B T d numbers of hidden states."""

    @in_plain_torch
    def __init__(self, model: Model, prompts: Sequence[Tensor]) -> None:
        self.model = model.replicate()
        self._layers = find_anatomy(self.model.hf).layers
        self._ids, mask = pad_prompts(list(prompts), "left", 0)
        self._mask, self._real = mask.long(), mask
        self._entered: list[Tensor] = []
        self._plain = True
        self.unsteered = self._run_once()

    @torch.no_grad()
    def _run_once(self) -> Float[Tensor, "B V"]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered.append(hidden_input(args, kwargs))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self._plain = isinstance(output, Tensor)
            self._entered.append(hidden_output(output))

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self._layers]
        handles.append(self._layers[-1].register_forward_hook(leave))
        with hooked(handles):
            return self._predict()

    @property
    def tokens(self) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """The embeddings of all n tokens, prompt by prompt, and their positions in their prompts."""
        return self._entered[0][self._real], (self._real.long().cumsum(1) - 1)[self._real]

    @in_plain_torch
    def sums(self, steering: Steering) -> Float[Tensor, "B T d"]:
        """Compute S at every position of every prompt; zero at padding. Cost: that of `Steering.push`."""
        found = steering.to(self.model.device).push(*self.tokens)
        S = found.new_zeros((*self._real.shape, found.shape[-1]))
        S[self._real] = found
        return S.cumsum(1) if steering.accumulates else S

    def hidden(self, point: str) -> Float[Tensor, "B T d"]:
        """Return the hidden states at `resid_pre.L` or `resid_post.L`, with padding."""
        return self._entered[self._find_node(point)]

    def rows(self, point: str) -> list[Tensor]:
        """Return the hidden states of each prompt `[T_b, d]`, without padding."""
        return [hidden[own] for hidden, own in zip(self.hidden(point), self._real, strict=True)]

    @in_plain_torch
    @torch.no_grad()
    def log_probs(
        self, steering: Steering, strength: float, form: Form = "add", S: Tensor | None = None
    ) -> Float[Tensor, "B V"]:
        """Compute log-probabilities of the next token as under `Steering.apply`; give S if it is known from `sums`."""
        h = self.hidden(steering.point)
        new = move_towards(h, self.sums(steering) if S is None else S, strength, form)
        moved = self._real & (self._real.cumsum(1) > 1) if steering.spare_first else self._real
        new = torch.where(moved.unsqueeze(-1), new, h)
        with self._start_at(self._find_node(steering.point), new):
            return self._predict()

    def _find_node(self, point: str) -> int:
        where = site(self.model, point)
        assert where.layer is not None
        return where.layer + (where.kind == "resid_post")

    @contextmanager
    def _start_at(self, node: int, hidden: Tensor) -> Iterator[None]:
        """Make the layers below a node return these hidden states without running."""
        skipped = self._layers[:node]
        before = [vars(layer).get("forward") for layer in skipped]

        def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_hidden_input(args, kwargs, hidden)

        entry = [] if skipped else [self._layers[0].register_forward_pre_hook(change, with_kwargs=True)]
        try:
            with hooked(entry):
                for layer in skipped:
                    layer.forward = lambda *_args, **_kwargs: hidden if self._plain else (hidden,)
                yield
        finally:
            for layer, forward in zip(skipped, before, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = forward

    def _predict(self) -> Float[Tensor, "B V"]:
        hf = self.model.hf
        known = inspect.signature(hf.forward).parameters
        options: dict[str, Any] = {"position_ids": (self._mask.cumsum(1) - 1).clamp_min(0), "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in known}
        output = hf(input_ids=self._ids, attention_mask=self._mask, use_cache=False, **options)
        return torch.log_softmax(output.logits[:, -1].float(), dim=-1)
