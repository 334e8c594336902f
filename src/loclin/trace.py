"""One forward pass, remembered: what enters each layer, and what the network's value is at each point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.errors import PromptError
from loclin.freeze import Hold, evaluation, frozen
from loclin.models.layout import Anatomy, anatomy
from loclin.models.model import Model
from loclin.points import Point


@dataclass(frozen=True)
class Call:
    """How a layer was called: its input hidden state `[1, T, d]` and everything else it was given."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Call `module` again as it was called, with another hidden state."""
        return first(module(hidden, *self.args, **self.kwargs))


def first(output: Any) -> Tensor:
    """A module's hidden-state output: some return it alone, some in front of other things."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Trace:
    """A frozen forward pass at one prompt.

    `layers[l]` is how layer l was called; `attn_out[l]` is what its attention added to the residual stream `[1, T, d]`;
    `pre_norm` is the last layer's output, `final` the final norm's. `stock_final` is the untouched model's own,
    and `stock_logits` `[V]` are its logits at the last position. `attention_received` `[T]` is the share of
    attention that later tokens give to each token, the mean over layers and heads.
    """

    model: Model
    anatomy: Anatomy
    hold: Hold
    input_ids: Int[Tensor, "1 T"]
    layers: list[Call]
    attn_out: list[Float[Tensor, "1 T d"]]
    pre_norm: Float[Tensor, "1 T d"]
    final: Float[Tensor, "1 T d"]
    stock_final: Float[Tensor, "1 T d"]
    stock_logits: Float[Tensor, " V"]
    attention_received: Float[Tensor, " T"]
    _logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """T, the number of input tokens."""
        return self.input_ids.shape[1]

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return self.layers[0].hidden.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream, and so of the sweeps."""
        return self.layers[0].hidden.dtype

    def position(self, position: int) -> int:
        """A position counted from the front.

        Raises
        ------
        PromptError
            When it lies outside the prompt.
        """
        if not -self.length <= position < self.length:
            raise PromptError(
                f"position {position} is outside the prompt, which has {self.length} tokens "
                f"(0 to {self.length - 1}, or -{self.length} to -1)"
            )
        return position % self.length

    def stream(self, node: int) -> Float[Tensor, "1 T d"]:
        """The residual stream's value at a node (see `Point.node`), before the final norm."""
        layer, mid = divmod(node, 2)
        if layer == self.n_layers:
            return self.pre_norm
        hidden = self.layers[layer].hidden
        return hidden + self.attn_out[layer].to(hidden.device) if mid else hidden

    def value(self, point: Point) -> Float[Tensor, "T n"]:
        """The frozen network's value at a point, at every position: `[T, d]`, or `[T, V]` for the logits."""
        if point.kind == "logits":
            return torch.stack([self.logits(position) for position in range(self.length)])
        if point.kind == "final":
            return self.final[0]
        if point.layer is not None and point.kind == "attn_out":
            return self.attn_out[point.layer][0]
        node = point.node(self.n_layers)
        if point.kind == "mlp_out":
            after = self.stream(node)
            return (after - self.stream(node - 1).to(after.device))[0]
        return self.stream(node)[0]

    def logits(self, position: int) -> Float[Tensor, " V"]:
        """The frozen network's logits at one position; soft caps and scales, where the model has them, included."""
        if position not in self._logits:
            with frozen(self.model.hf, self.hold), torch.no_grad():
                self._logits[position] = _logits(self.model, self.input_ids, position)
        return self._logits[position]


def trace(model: Model, input_ids: Int[Tensor, "1 T"], hold: Hold) -> Trace:
    """Run the model twice, stock and frozen, and remember the frozen pass.

    Cost: two forward passes. Memory: 2 L T d numbers and the masks.

    Raises
    ------
    NotExactError
        When a rule does not describe a module it matched.
    """
    parts = anatomy(model.hf)
    input_ids = input_ids.to(model.device)
    with evaluation(model.hf), torch.no_grad():
        with _recording(parts) as stock:
            stock_logits = _logits(model, input_ids, input_ids.shape[1] - 1)
        with frozen(model.hf, hold, keep=_received) as attention, _recording(parts) as held:
            logits = _logits(model, input_ids, input_ids.shape[1] - 1)
    return Trace(
        model=model,
        anatomy=parts,
        hold=hold,
        input_ids=input_ids,
        layers=held.calls,
        attn_out=held.attn_out,
        pre_norm=held.pre_norm,
        final=held.final,
        stock_final=stock.final,
        stock_logits=stock_logits,
        attention_received=torch.stack([share.cpu() for share in attention.values()]).mean(0),
        _logits={input_ids.shape[1] - 1: logits},
    )


def _received(probs: Tensor) -> Tensor:
    """The mean attention `[T]` that the queries behind each token give to it; 0 for the last, which has none."""
    behind = torch.arange(probs.shape[-1] - 1, -1, -1, device=probs.device).clamp_min(1)
    return (probs.float().tril(-1).sum(-2) / behind).mean((0, 1))


def _logits(model: Model, input_ids: Tensor, position: int) -> Tensor:
    keep = torch.tensor([position], device=input_ids.device)
    return model.hf(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits[0, 0]


class _Recorder:
    calls: list[Call]
    attn_out: list[Tensor]
    pre_norm: Tensor
    final: Tensor


@contextmanager
def _recording(parts: Anatomy) -> Iterator[_Recorder]:
    record = _Recorder()
    record.calls, record.attn_out = [], []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        record.calls.append(Call(hidden.detach(), args[1:], rest))

    def attended(_module: nn.Module, _args: Any, output: Any) -> None:
        record.attn_out.append(first(output).detach())

    def normed(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        record.pre_norm, record.final = args[0].detach(), output.detach()

    handles = [part.register_forward_pre_hook(enter, with_kwargs=True) for part in parts.layers]
    handles += [part.get_submodule(parts.layout.attn).register_forward_hook(attended) for part in parts.layers]
    handles.append(parts.final_norm.register_forward_hook(normed))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
