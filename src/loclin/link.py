"""One layer (or the final norm, or the head) at its recorded input: a small affine map with batched products.

A link rebuilds its own autograd graph from the recorded input at each call, so memory is one layer's graph whatever the
depth. Every product takes a whole block of vectors: one *column* is one vector pushed through all positions once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.freeze import Hold, biases, frozen
from loclin.trace import Trace, first

Columns = Float[Tensor, "n T d"]


def batched_vjp(output: Tensor, source: Tensor, cotangents: Tensor) -> Tensor:
    """Products of a block of cotangents `[n, *output.shape]` with the map from `source` to `output`."""
    (pulled,) = torch.autograd.grad(
        output, source, cotangents, is_grads_batched=True, allow_unused=True, retain_graph=True
    )
    return source.new_zeros((len(cotangents), *source.shape)) if pulled is None else pulled


def batched_jvp(output: Tensor, source: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that maps a block of tangents `[n, *source.shape]` from `source` to `output`.

    A vjp is linear in its cotangent; its derivative in the cotangent is the jvp. Unlike forward-mode AD this respects
    `detach`, on which every held coefficient rests.
    """
    cotangent = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, source, cotangent, create_graph=True, allow_unused=True)

    def push(tangents: Tensor) -> Tensor:
        if pulled is None or not pulled.requires_grad or not len(tangents):
            return output.new_zeros((len(tangents), *output.shape))
        (pushed,) = torch.autograd.grad(pulled, cotangent, tangents, is_grads_batched=True, retain_graph=True)
        return pushed

    return push


def _chunks(block: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    return block.split(chunk or len(block)) if len(block) else ()


@dataclass
class Graph:
    """A layer's tensors at its points.

    `attn_shift` is a zero added to the attention's output: moving it moves `resid_mid` and nothing before it, so it
    stands for the points between attention and MLP.
    """

    points: dict[str, Tensor]
    attn_shift: Tensor
    biases: dict[str, nn.Parameter]

    def source(self, kind: str) -> Tensor:
        """The leaf to move for a source point, `resid_pre` or `resid_mid`."""
        return self.points["resid_pre"] if kind == "resid_pre" else self.attn_shift


class LayerLink:
    """A decoder layer at its recorded input.

    Points are the layer's own: `resid_pre`, `attn_out`, `resid_mid`, `mlp_out`, `resid_post`; a source is `resid_pre`
    or `resid_mid`.
    """

    def __init__(self, trace: Trace, index: int, hold: Hold | None = None) -> None:
        self.module = trace.anatomy.layers[index]
        self.name = f"layers.{index}"
        self.device = trace.layers[index].hidden.device
        self.call = trace.layers[index]
        self.layout = trace.anatomy.layout
        self.hold = hold or trace.hold

    def graph(self, live_biases: bool = False) -> Graph:
        """Rebuild the layer's own autograd graph from its recorded input. Cost: one forward pass of the layer."""
        x = self.call.hidden.detach().requires_grad_()
        shift = torch.zeros_like(x, requires_grad=True)
        seen: dict[str, Tensor] = {}

        def attended(_module: nn.Module, _args: object, output: object) -> object:
            seen["attn_out"] = first(output) + shift
            return (seen["attn_out"], *output[1:]) if isinstance(output, tuple) else seen["attn_out"]

        def mlp(_module: nn.Module, _args: object, output: object) -> None:
            seen["mlp_out"] = first(output)

        with torch.enable_grad(), frozen(self.module, self.hold, name=self.name, live_biases=live_biases):
            handles = [
                self.module.get_submodule(self.layout.attn).register_forward_hook(attended),
                self.module.get_submodule(self.layout.mlp).register_forward_hook(mlp),
            ]
            try:
                post = self.call(self.module, x)
            finally:
                for handle in handles:
                    handle.remove()
            points = {"resid_pre": x, "resid_mid": x + seen["attn_out"], "resid_post": post, **seen}
        return Graph(points, shift, biases(self.module) if live_biases else {})

    def vjp(
        self, cotangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Pull a block of cotangents from `target` back to `source`, `chunk` columns at a time through one graph.

        Yields the chunks in order. Cost: n columns of this layer.
        """
        graph = self.graph()
        for part in _chunks(cotangents, chunk):
            yield batched_vjp(graph.points[target], graph.source(source), part.to(self.device).unsqueeze(1)).squeeze(1)

    def jvp(
        self, tangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Push a block of tangents from `source` forward to `target`; chunks and cost as for `vjp`."""
        graph = self.graph()
        push = batched_jvp(graph.points[target], graph.source(source))
        for part in _chunks(tangents, chunk):
            yield push(part.to(self.device).unsqueeze(1)).squeeze(1)

    def constants(self, source: str = "resid_pre", target: str = "resid_post") -> dict[str, Float[Tensor, "T d"]]:
        """What each bias inside the layer, behind `source`, adds at `target`; by the bias's path."""
        if not biases(self.module):
            return {}
        graph = self.graph(live_biases=True)
        sources = dict(graph.biases)
        if source == "resid_mid":
            sources = {name: bias for name, bias in sources.items() if _behind_attention(graph, bias)}
        return {
            f"{self.name}.{name}": pushed[0, 0]
            for name, bias in sources.items()
            if (pushed := batched_jvp(graph.points[target], bias)(bias.detach().unsqueeze(0))).any()
        }


def _behind_attention(graph: Graph, bias: nn.Parameter) -> bool:
    """Whether a bias enters behind the attention, so that `resid_mid` does not hold it yet."""
    (moves_mid,) = torch.autograd.grad(graph.points["resid_mid"].sum(), bias, retain_graph=True, allow_unused=True)
    return moves_mid is None


class NormLink:
    """The final norm, frozen at a given hidden state. Position-wise: it takes blocks `[n, d]` at one position."""

    def __init__(self, trace: Trace, hidden: Float[Tensor, " d"], hold: Hold | None = None) -> None:
        self.module = trace.anatomy.final_norm
        self.name = "final_norm"
        self.device = hidden.device
        self._hidden = hidden.detach()
        self._hold = hold or trace.hold

    def _graph(self, live_biases: bool = False) -> tuple[Tensor, Tensor]:
        x = self._hidden[None, None].clone().requires_grad_()
        with torch.enable_grad(), frozen(self.module, self._hold, name=self.name, live_biases=live_biases):
            return x, self.module(x)

    def value(self) -> Float[Tensor, " d"]:
        """The frozen norm's output at the given hidden state."""
        return self._graph()[1].detach()[0, 0]

    def vjp(self, cotangents: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Pull a block of cotangents back through the norm."""
        if not len(cotangents):
            return cotangents
        x, y = self._graph()
        return batched_vjp(y, x, cotangents.to(self.device)[:, None, None])[:, 0, 0]

    def jvp(self, tangents: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Push a block of tangents through the norm."""
        x, y = self._graph()
        return batched_jvp(y, x)(tangents.to(self.device)[:, None, None])[:, 0, 0]

    def constants(self) -> dict[str, Float[Tensor, " d"]]:
        """What each of the norm's biases adds to its output."""
        if not biases(self.module):
            return {}
        y = self._graph(live_biases=True)[1]
        return {
            f"{self.name}.{name}": batched_jvp(y, bias)(bias.detach().unsqueeze(0))[0, 0, 0]
            for name, bias in biases(self.module).items()
        }


class HeadLink:
    """The output head at one position: a matrix, then the factor that a soft cap or a logit scale amounts to there."""

    def __init__(self, trace: Trace, position: int) -> None:
        self.name = "head"
        self.weight = trace.anatomy.head_weight
        self.bias: Tensor | None = getattr(trace.anatomy.head, "bias", None)
        self.device = self.weight.device
        with torch.no_grad():
            raw = trace.anatomy.head(trace.final[:, [position]].to(self.device))[0, 0]
        logits = trace.logits(position).to(self.device)
        self.factor = torch.ones_like(raw)
        if not torch.equal(raw, logits):
            self.factor = torch.where(raw == 0, self.factor, logits / raw)

    def vjp(self, cotangents: Float[Tensor, "n V"]) -> Float[Tensor, "n d"]:
        """Pull a block of cotangents over the vocabulary back to the final norm's output."""
        return (cotangents.to(self.device) * self.factor) @ self.weight

    def jvp(self, tangents: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """Push a block of tangents at the final norm's output to the logits."""
        return tangents.to(self.device) @ self.weight.T * self.factor

    def constants(self) -> dict[str, Float[Tensor, " V"]]:
        """What the head's bias adds to the logits."""
        return {} if self.bias is None else {"head.bias": self.bias.detach() * self.factor}
