"""One layer (or the final norm, or the head) at its recorded input: a small affine map with batched products.

A link rebuilds its own autograd graph from the recorded input at each call, so memory is one layer's graph whatever the
depth. Every product takes a whole block of vectors: one *column* is one vector pushed through all positions once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.freeze import Hold, frozen
from loclin.network.anatomy import Weights
from loclin.network.blocks import Workspace
from loclin.network.coefficients import Coefficients, Reader
from loclin.network.explicit import ExplicitLayer
from loclin.network.route import first, hidden_state, logits_at
from loclin.network.trace import Call, Trace, agrees
from loclin.network.units import Constants, Inside

Columns = Float[Tensor, "n T d"]
_HEAD_PARTS = 16


@contextmanager
def _weights_stay() -> Iterator[None]:
    """Say so where a graph cannot be gone through any more because a weight in it has changed."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ModelError(
            "the model's weights changed while a map was computed: does another thread train it? Linearize it again"
        ) from error


def batched_vjp(output: Tensor, source: Tensor, cotangents: Tensor) -> Tensor:
    """Products of a block of cotangents `[n, *output.shape]` with the map from `source` to `output`."""
    pulled = None
    if output.requires_grad:
        with _weights_stay():
            (pulled,) = torch.autograd.grad(
                output, source, cotangents, is_grads_batched=True, allow_unused=True, retain_graph=True
            )
    return source.new_zeros((len(cotangents), *source.shape)) if pulled is None else pulled


def batched_jvp(output: Tensor, source: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that maps a block of tangents `[n, *source.shape]` from `source` to `output`.

    A vjp is linear in its cotangent; its derivative in the cotangent is the jvp. Unlike forward-mode AD this respects
    `detach`, on which every held coefficient rests.
    """
    cotangent, pulled = torch.zeros_like(output, requires_grad=True), None
    if output.requires_grad:
        (pulled,) = torch.autograd.grad(output, source, cotangent, create_graph=True, allow_unused=True)

    def push(tangents: Tensor) -> Tensor:
        if pulled is None or not pulled.requires_grad or not len(tangents):
            return output.new_zeros((len(tangents), *output.shape))
        with _weights_stay():
            (pushed,) = torch.autograd.grad(pulled, cotangent, tangents, is_grads_batched=True, retain_graph=True)
        return pushed

    return push


def _chunks(block: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    return block.split(chunk or len(block)) if len(block) else ()


def pushed_constants(output: Tensor, constants: Constants) -> dict[str, Tensor]:
    """What each constant adds at `output` `[1, T, d]`, as `[T, d]`; by name, without those that do not reach it."""
    found: dict[str, Tensor] = {}
    for name, leaf in constants:
        pushed = batched_jvp(output, leaf)(leaf.detach().unsqueeze(0))[0]
        if pushed.any():
            found[name] = found[name] + pushed[0] if name in found else pushed[0]
    return found


@dataclass
class Graph:
    """A layer's tensors on the linear path, at its points.

    `attn_shift` is a zero added to the attention's output: moving it moves `resid_mid` and nothing before it, so it
    stands for the points between attention and MLP. `lookups` names the constants `[1, T, ...]` that are the tokens'
    own: rows of a table other than the input embeddings.
    """

    points: dict[str, Tensor]
    attn_shift: Tensor
    constants: Constants
    lookups: frozenset[str] = frozenset()

    __repr__ = brief

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads the layer's input, so that attention's output does not pass it."""
        mlp = self.points.get("mlp_out")
        if mlp is None or not mlp.requires_grad:
            return False
        (moves,) = torch.autograd.grad(mlp.sum(), self.attn_shift, retain_graph=True, allow_unused=True)
        return moves is None

    def source(self, kind: str) -> Tensor:
        """The leaf to move for a source point, `resid_pre` or `resid_mid`."""
        return self.points["resid_pre"] if kind == "resid_pre" else self.attn_shift


class LayerLink:
    """A decoder layer at its recorded input.

    Points are the layer's own: `resid_pre`, `attn_out`, `resid_mid`, `mlp_out`, `resid_post`; a source is `resid_pre`
    or `resid_mid`.
    """

    def __init__(self, trace: Trace, index: int, hold: Hold | None = None) -> None:
        self.trace = trace
        self.index = index
        self.call: Call = trace.layers[index]
        self.module = self.call.block.module
        self.name = self.call.block.name
        self.device = self.call.hidden.device
        self.hold = hold or trace.hold

    @cached_property
    def parallel(self) -> bool:
        """Whether the MLP stands beside the attention (see `Graph.parallel`). Cost: two forward passes, once."""
        return self.graph().parallel

    def explicit(self, workspace: Workspace) -> ExplicitLayer | None:
        """The layer's explicit products, where it has them. Cost: a forward pass, if its coefficients are not kept."""
        weights, trace = self.trace.anatomy.weights, self.trace
        if weights is None or not trace.explicit[self.index] or self.hold != trace.hold:
            return None
        trace.check_weights(self.module)
        held = trace.coefficients[self.index] or self._coefficients(weights)
        return ExplicitLayer(self.module, weights, held, trace.dtype, workspace)

    def _coefficients(self, weights: Weights) -> Coefficients:
        probs: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            probs.append(found)
            return found

        with frozen(self.module, self.hold, self.trace.dtype, name=self.name, keep=keep) as mode, torch.no_grad():
            mode.graph = False
            reader = Reader(mode, self.module, weights)
            handles = list(reader.hooks())
            hidden = self.call.hidden.clone()
            mode.enter(hidden, self.call.value)
            try:
                self.call(hidden)
            finally:
                for handle in handles:
                    handle.remove()
        held = reader.found(probs[-1])
        assert held is not None  # the same pass was read before
        return held

    def graph(self, collect: bool = False, inside: Inside | None = None) -> Graph:
        """Rebuild the layer's own graph from its recorded input. Cost: two forward passes of the layer.

        `collect` makes leaves of its constants; `inside` watches for its heads and neurons.
        """
        if self.trace.route.whole is not None:
            return whole_graph(self.trace, self.hold, collect)
        self.trace.check_weights(self.module)
        parts = self.call.block.parts
        seen: dict[str, Tensor] = {}
        keep = None if inside is None else inside.keep
        freeze = frozen(self.module, self.hold, self.trace.dtype, name=self.name, collect=collect, keep=keep)
        with freeze as mode, torch.no_grad():
            hidden = self.call.hidden.clone()
            x = mode.enter(hidden, self.call.value.clone().requires_grad_())
            shift = torch.zeros_like(x, requires_grad=True)

            def attended(_module: nn.Module, _args: object, output: object) -> None:
                with mode.paused():
                    seen["attn_out"] = mode.live(first(output)) + shift
                    mode.enter(first(output), seen["attn_out"])

            def mlp(_module: nn.Module, _args: object, output: object) -> None:
                with mode.paused():  # a copy: some layers add to it in place
                    seen["mlp_out"] = mode.live(first(output)).clone()

            handles = [
                self.module.get_submodule(path).register_forward_hook(hook)
                for path, hook in ((parts.attn, attended), (parts.mlp, mlp))
                if path is not None
            ]
            if inside is not None:
                handles += inside.hooks(mode, self.module, self.name)
            try:
                again = self.call(hidden)
                post = mode.live(again)
            finally:
                for handle in handles:
                    handle.remove()
        check_again(self.trace, again, self.trace.entered(self.index + 1), self.name)
        points = {"resid_pre": x, "resid_post": post, **seen}
        if "attn_out" in seen:
            points["resid_mid"] = x + seen["attn_out"]
        return Graph(points, shift, mode.constants)

    def vjp(
        self, cotangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Pull a block of cotangents from `target` back to `source`, `chunk` columns at a time through one graph.

        Yields the chunks in order. Cost: n columns of this layer.
        """
        graph = self._graph(source, target)
        for part in _chunks(cotangents, chunk):
            yield batched_vjp(graph.points[target], graph.source(source), part.to(self.device).unsqueeze(1)).squeeze(1)

    def jvp(
        self, tangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Push a block of tangents from `source` forward to `target`; chunks and cost as for `vjp`."""
        graph = self._graph(source, target)
        push = batched_jvp(graph.points[target], graph.source(source))
        for part in _chunks(tangents, chunk):
            yield push(part.to(self.device).unsqueeze(1)).squeeze(1)

    def _graph(self, source: str, target: str, collect: bool = False) -> Graph:
        for kind in (source, target):
            if kind == "resid_mid":
                self.trace.part(self.index, "attn_out")
            elif kind in ("attn_out", "mlp_out"):
                self.trace.part(self.index, kind)
        return self.graph(collect)

    def constants(self, source: str = "resid_pre", target: str = "resid_post") -> dict[str, Float[Tensor, "T d"]]:
        """What each bias or constant inside the layer, behind `source`, adds at `target`; by its path."""
        graph = self._graph(source, target, collect=True)
        constants = graph.constants
        if source == "resid_mid" and graph.parallel:
            return {f"{self.name}: the MLP beside the attention": graph.points["mlp_out"].detach()[0]}
        if source == "resid_mid":
            constants = [(name, leaf) for name, leaf in constants if behind_attention(graph, leaf)]
        return pushed_constants(graph.points[target], constants)


def check_again(trace: Trace, again: Tensor, before: Tensor, name: str) -> None:
    """Refuse a part of the model that does not give again what it gave when it was traced.

    Raises
    ------
    ModelError
        Naming the part.
    """
    if not trace.random and not agrees(again, before, trace.hold.precision == "double"):
        raise ModelError(
            f"{trace.model.info.name}: {name} does not give again what it gave when the prompt was linearized: its "
            "weights or something that it keeps have changed. Linearize it again",
            name,
        )


def behind_attention(graph: Graph, constant: Tensor) -> bool:
    """Whether a constant enters behind the attention, so that `resid_mid` does not hold it yet."""
    middle = graph.points["resid_mid"]
    (moves,) = torch.autograd.grad(middle.sum(), constant, retain_graph=True, allow_unused=True)
    return moves is None


def at_entry(trace: Trace, enter: Callable[[Tensor], None]) -> RemovableHandle:
    """Hook the place where the network's input comes by: what enters the first layer, or what the embeddings give."""
    if trace.route.whole is not None:
        embeddings = trace.model.hf.get_input_embeddings()
        return embeddings.register_forward_hook(lambda _m, _a, output: enter(output))
    return trace.layers[0].block.module.register_forward_pre_hook(
        lambda _m, args, kwargs: enter(hidden_state(args, kwargs)), with_kwargs=True
    )


def whole_graph(trace: Trace, hold: Hold, collect: bool = False) -> Graph:
    """The graph of the whole network from the embeddings to `final`, in one piece.

    Cost: two forward passes. Memory: every layer's graph at once.
    """
    model, points = trace.model, {}
    trace.check_weights(model.hf)
    entry = trace.layers[0]
    x = entry.value.detach().clone().requires_grad_()
    with frozen(model.hf, hold, trace.dtype, collect=collect) as mode, torch.no_grad():

        def enter(hidden: Tensor) -> None:
            if "resid_pre" not in points:
                points["resid_pre"] = mode.enter(hidden, x)

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            points["resid_post"] = mode.live(first(output))
            points["again"] = first(output)
            mode.collect = False

        handles = [at_entry(trace, enter), trace.route.exit.register_forward_hook(leave)]
        handles += mode.look_up(trace.input_ids, model.hf.get_input_embeddings())
        try:
            logits_at(model, trace.input_ids, trace.length - 1)
        finally:
            for handle in handles:
                handle.remove()
    check_again(trace, points.pop("again"), trace.stock_final, "the model")
    lookups = frozenset(name for name, _ in mode.lookups.values())
    return Graph(points, torch.zeros_like(x, requires_grad=True), mode.constants, lookups)


class NormLink:
    """The final norm, frozen at a given hidden state. Position-wise: it takes blocks `[n, d]` at one position.

    d_final is d but where the tail merges several streams.
    """

    def __init__(self, trace: Trace, hidden: Float[Tensor, " d"], value: Tensor, hold: Hold | None = None) -> None:
        self.module = trace.end.block.module
        trace.check_weights(self.module)
        self.name = trace.end.block.name
        self.device = hidden.device
        self._hidden, self._value, self._dtype = hidden.detach(), value.detach(), trace.dtype
        self._hold = hold or trace.hold

    def _graph(self, collect: bool = False) -> tuple[Tensor, Tensor, Constants]:
        with frozen(self.module, self._hold, self._dtype, name=self.name, collect=collect) as mode, torch.no_grad():
            hidden = self._hidden[None, None].clone()
            x = mode.enter(hidden, self._value[None, None].to(self._dtype).clone().requires_grad_())
            return x, mode.live(self.module(hidden)), mode.constants

    def value(self) -> Float[Tensor, " d_final"]:
        """The frozen norm's output at the given hidden state."""
        return self._graph()[1][0, 0].detach()

    def vjp(self, cotangents: Float[Tensor, "n d_final"]) -> Float[Tensor, "n d"]:
        """Pull a block of cotangents back through the norm."""
        if not len(cotangents):
            return cotangents.new_zeros(0, len(self._hidden))
        x, y, _ = self._graph()
        return batched_vjp(y, x, cotangents.to(self.device)[:, None, None])[:, 0, 0]

    def jvp(self, tangents: Float[Tensor, "n d"]) -> Float[Tensor, "n d_final"]:
        """Push a block of tangents through the norm."""
        if not len(tangents):
            return tangents.new_zeros(0, len(self.value()))
        x, y, _ = self._graph()
        return batched_jvp(y, x)(tangents.to(self.device)[:, None, None])[:, 0, 0]

    def constants(self) -> dict[str, Float[Tensor, " d_final"]]:
        """What each of the norm's biases adds to its output."""
        _, y, constants = self._graph(collect=True)
        return {name: pushed[0] for name, pushed in pushed_constants(y, constants).items()}


class HeadLink:
    """The way from `final` to the logits at one position: the head, and whatever the model does around it."""

    def __init__(self, trace: Trace, position: int) -> None:
        self.name = "head"
        trace.check_weights(trace.anatomy.head)
        self._head = trace.head(position)
        self.device = self._head.logits.device

    def vjp(self, cotangents: Float[Tensor, "n V"]) -> Float[Tensor, "n d"]:
        """Pull a block of cotangents over the vocabulary back to `final`."""
        return batched_vjp(self._head.logits, self._head.final, cotangents.to(self.device))

    def vjp_in_parts(self, cotangent: Float[Tensor, " V"]) -> Float[Tensor, " d"]:
        """Pull one cotangent back, float64: a float32 sum over a whole vocabulary is off by 1e-5.

        Cost: 16 columns through the head, which take about the time of one.
        """
        parts = cotangent.new_zeros(_HEAD_PARTS, len(cotangent))
        for i in range(_HEAD_PARTS):
            parts[i, i::_HEAD_PARTS] = cotangent[i::_HEAD_PARTS]
        return self.vjp(parts).double().sum(0)

    def jvp(self, tangents: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """Push a block of tangents at `final` to the logits."""
        return batched_jvp(self._head.logits, self._head.final)(tangents.to(self.device))

    def constants(self) -> dict[str, Float[Tensor, " V"]]:
        """What the head's biases add to the logits."""
        found: dict[str, Tensor] = {}
        for name, leaf in self._head.constants:
            pushed = batched_jvp(self._head.logits, leaf)(leaf.detach().unsqueeze(0))[0]
            if pushed.any():
                found[name] = found.get(name, 0) + pushed
        return found
