"""From the residual stream to a target: the final norm and the output head, at one position.

A target is logits = H(N(x)), final = N(x), or, with the final norm on top, N(x) at any point of the stream. N is frozen
at the hidden state that enters it, and H at `final`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.freeze import FreezeOptions, frozen
from loclin.network.autograd import Constants, batched_jvp, batched_vjp, push_constants
from loclin.network.points import Point
from loclin.network.trace import Trace

_HEAD_PARTS = 16


class NormLink:
    """The final norm, frozen at a hidden state, or at those of m positions; d_final is d unless streams merge."""

    def __init__(self, trace: Trace, hidden: Float[Tensor, "*m d"], value: Tensor, options: FreezeOptions) -> None:
        self.module, self.name = trace.end.block.module, trace.end.block.name
        trace.check_weights(self.module)
        self.device = hidden.device
        self._hidden, self._value, self._dtype = hidden.detach(), value.detach(), trace.dtype
        self._options = options

    def _graph(self, collect: bool = False) -> tuple[Tensor, Tensor, Constants]:
        """The norm's input and output `[1, m, d]` on the linear path, and its constants."""
        with frozen(self.module, self._options, self._dtype, name=self.name, collect=collect) as mode, torch.no_grad():
            hidden = _in_a_batch(self._hidden).clone()
            x = mode.enter(hidden, _in_a_batch(self._value).to(self._dtype).clone().requires_grad_())
            return x, mode.live(self.module(hidden)), mode.constants

    def value(self) -> Float[Tensor, "*m d_final"]:
        """The frozen norm's output at the given hidden states."""
        return self._apart(self._graph()[1].detach())[0]

    def vjp(self, cotangents: Float[Tensor, "n *m d_final"]) -> Float[Tensor, "n *m d"]:
        """Pull a block of cotangents back through the norm."""
        if not len(cotangents):
            return cotangents.new_zeros(0, *self._hidden.shape)
        x, y, _ = self._graph()
        return self._apart(batched_vjp(y, x, self._together(cotangents, y)))

    def jvp(self, tangents: Float[Tensor, "n *m d"]) -> Float[Tensor, "n *m d_final"]:
        """Push a block of tangents through the norm."""
        if not len(tangents):
            return tangents.new_zeros(0, *self.value().shape)
        x, y, _ = self._graph()
        return self._apart(batched_jvp(y, x)(self._together(tangents, x)))

    def constants(self) -> dict[str, Float[Tensor, "*m d_final"]]:
        """What each of the norm's biases adds to its output."""
        _, y, constants = self._graph(collect=True)
        return push_constants(constants, y, self._apart)

    def _together(self, block: Tensor, point: Tensor) -> Tensor:
        """A block of vectors `[n, *m, d]` as `[n, 1, m, d]`, as the graph has them."""
        return block.to(self.device).reshape(len(block), *point.shape)

    def _apart(self, block: Tensor) -> Tensor:
        """The graph's vectors `[n, 1, m, d]` (or `[1, m, d]`) as `[n, *m, d]`."""
        return block.reshape(-1, *self._hidden.shape[:-1], block.shape[-1])


def _in_a_batch(vectors: Tensor) -> Tensor:
    """Vectors `[d]` or `[m, d]` as a batch of one `[1, m, d]`."""
    return vectors.reshape(1, -1, vectors.shape[-1])


class OutputHeadLink:
    """From `final` to the logits at one position, or at n together: the head, and what the model does around it."""

    def __init__(self, trace: Trace, position: int | Sequence[int]) -> None:
        self.name = "head"
        trace.check_weights(trace.anatomy.head)
        self._head = trace.head(position) if isinstance(position, int) else trace.heads(position)
        self.device = self._head.logits.device

    @property
    def value(self) -> Float[Tensor, "*n V"]:
        """The frozen network's logits."""
        return self._head.value

    def vjp(self, cotangents: Float[Tensor, "c *n V"]) -> Float[Tensor, "c *n d"]:
        """Pull a block of cotangents over the vocabulary back to `final`."""
        return batched_vjp(self._head.logits, self._head.final, cotangents.to(self.device))

    def vjp_in_parts(self, cotangent: Float[Tensor, "*n V"]) -> Float[Tensor, "*n d"]:
        """Pull one cotangent back, by 16 columns, in float64: a float32 sum over a whole vocabulary is off by 1e-5.

        Cost: 16 columns of the head for each position. Memory: those of 16 positions at most.
        """
        most = max(1, _HEAD_PARTS // max(1, cotangent[..., 0].numel()))
        pulled = torch.zeros_like(self._head.final, dtype=torch.float64)
        for first in range(0, _HEAD_PARTS, most):
            some = range(first, min(first + most, _HEAD_PARTS))
            parts = cotangent.new_zeros(len(some), *cotangent.shape)
            for part, i in zip(parts, some, strict=True):
                part[..., i::_HEAD_PARTS] = cotangent[..., i::_HEAD_PARTS]
            pulled += self.vjp(parts).double().sum(0)
        return pulled

    def jvp(self, tangents: Float[Tensor, "c *n d"]) -> Float[Tensor, "c *n V"]:
        """Push a block of tangents at `final` to the logits."""
        return batched_jvp(self._head.logits, self._head.final)(tangents.to(self.device))

    def constants(self) -> dict[str, Float[Tensor, "*n V"]]:
        """What the head's biases add to the logits."""
        return push_constants(self._head.constants, self._head.logits)


class Readout:
    """From the stream to a target at one position; `normed` puts the final norm on top of one before it."""

    def __init__(
        self, trace: Trace, options: FreezeOptions, target: Point, position: int | list[int], normed: bool
    ) -> None:
        self._trace, self._options, self._target, self._position = trace, options, target, position
        self._has_norm = normed or target.kind in ("final", "logits")

    @property
    def width(self) -> int:
        """d_out: d, that of `final`, or the size of the vocabulary."""
        if self._target.kind == "logits":
            return self._trace.stock_logits.shape[0]
        return self._trace.final.shape[-1] if self._has_norm else self._trace.width

    def vjp(self, cotangents: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d"]:
        """Pull a block of cotangents from the target back to the residual stream."""
        if self._target.kind == "logits":
            cotangents = OutputHeadLink(self._trace, self._position).vjp(cotangents)
        return self.norm().vjp(cotangents) if self._has_norm else cotangents

    def jvp(self, tangents: Float[Tensor, "n d"]) -> Float[Tensor, "n d_out"]:
        """Push a block of tangents from the residual stream to the target."""
        if self._has_norm:
            tangents = self.norm().jvp(tangents)
        return OutputHeadLink(self._trace, self._position).jvp(tangents) if self._target.kind == "logits" else tangents

    def constants(self) -> dict[str, Float[Tensor, " d_out"]]:
        """What the biases of the norm and the head add at the target, by their paths."""
        found = self.norm().constants() if self._has_norm else {}
        if self._target.kind != "logits":
            return found
        head = OutputHeadLink(self._trace, self._position)
        return {name: head.jvp(added[None])[0] for name, added in found.items()} | head.constants()

    def norm(self) -> NormLink:
        """The final norm, frozen at the value that it has on top of the target."""
        end = self._trace.end
        if self._target.kind in ("final", "logits"):
            hidden, value = end.hidden[0, self._position], end.value[0, self._position]
        else:
            value = self._trace.value(self._target)[self._position]
            hidden = value.to(end.hidden.dtype)
        return NormLink(self._trace, hidden, value, self._options)
