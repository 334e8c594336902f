"""One layer at its recorded input: the affine map y = J_l x + b_l, with products for blocks of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from loclin.freeze import FreezeOptions, Frozen
from loclin.freeze.pattern import Pattern
from loclin.models.forward import hidden_output, hooked, with_hidden_output
from loclin.network.anatomy import Weights
from loclin.network.autograd import batched_jvp, batched_vjp, push_constants
from loclin.network.blocks import LayerCoefficients, Workspace
from loclin.network.explicit import ExplicitLayer, Others
from loclin.network.graph import Graph, check_reproduced, network_graph
from loclin.network.reader import CoefficientReader
from loclin.network.trace import BlockCall, Trace, takes_values

Columns = Float[Tensor, "n T d"]
Product = Callable[[Columns], Columns]
Made = TypeVar("Made")
Unit = TypeVar("Unit")


@runtime_checkable
class Finder(Protocol):
    """What looks for something inside a layer while its graph is built."""

    def keep(self, pattern: Pattern) -> None:
        """Take the attention pattern."""

    def hooks(self, mode: Frozen, layer: nn.Module, name: str) -> Iterator[RemovableHandle]:
        """Hook the parts of a layer called `name`."""


class LayerLink:
    """A decoder layer at its recorded input, from which each call rebuilds its graph: memory holds one at a time.

    Points are the layer's own: `resid_pre`, `attn_out`, `resid_mid`, `mlp_out`, `resid_post`; a source is `resid_pre`
    or `resid_mid`.
    """

    def __init__(self, trace: Trace, index: int, options: FreezeOptions) -> None:
        self.trace, self.index, self.options = trace, index, options
        self.call = trace.layers[index]
        self.module, self.name = self.call.block.module, self.call.block.name
        self.device = self.call.hidden.device
        # A network that is one layer is run as a whole, where it lives.
        self._crew = None if trace.sequence.fallback_reason is not None else trace.model.crew

    def _on(self, worker: int) -> LayerLink:
        """The layer on the device of a worker: its weights, its recorded input, and what it must give."""
        assert self._crew is not None
        if worker == self._crew.home(self.module):
            return self
        trace, call = self.trace, self.call
        to = partial(_to, device=self._crew.devices[worker])
        block = replace(call.block, module=self._crew.layer(worker, self.module, self.name))
        layers, args = [*trace.layers], tree_map(to, (call.hidden, call.value, call.args, call.kwargs))
        layers[self.index] = BlockCall(block, *args)
        return LayerLink(replace(trace, layers=layers), self.index, self.options)

    def each(
        self,
        make: Callable[[LayerLink], Made],
        work: Callable[[Made, Unit], object],
        units: Sequence[Unit],
    ) -> None:
        """Do the work of each unit with what is made for this layer; shared by devices, where the model has several."""
        if self._crew is not None:
            self._crew.deal(lambda worker: make(self._on(worker)), work, units, self._crew.home(self.module))
            return
        made = make(self)
        for unit in units:
            work(made, unit)

    @cached_property
    def parallel(self) -> bool:
        """Whether the MLP is parallel to the attention (see `Graph.parallel`). Cost: two forward passes, once."""
        return self.graph().parallel

    def explicit(self, workspace: Workspace) -> ExplicitLayer | None:
        """The layer's explicit products, where it has them.

        Cost: a forward pass, if its coefficients are not kept; in float32 without attention, which the trace has.
        """
        weights, trace = self.trace.anatomy.weights, self.trace
        if weights is None or not trace.explicit[self.index] or self.options != trace.options:
            return None
        if self.device.type == "cpu":
            trace.check_weights(self.module)
        elif not workspace.checked:  # once in a sweep: each check waits for the device
            trace.check_layers()
            workspace.checked = True
        coefficients = trace.coefficients[self.index] or self._read_coefficients(weights)
        others = self._others(weights, coefficients, workspace)
        return ExplicitLayer(
            self.module, weights, coefficients, trace.dtype, workspace, trace.split.at(self.index), others
        )

    def _others(self, weights: Weights, coefficients: LayerCoefficients, workspace: Workspace) -> Others | None:
        crew, dtype, split = self._crew, self.trace.dtype, self.trace.split.at(self.index)
        if crew is None:
            return None

        def make(worker: int) -> ExplicitLayer:
            layer, own = crew.layer(worker, self.module, self.name), coefficients.on(crew.devices[worker])
            return ExplicitLayer(layer, weights, own, dtype, workspace.of(worker), split, is_other=True)

        return Others(crew, crew.home(self.module), make)

    def _read_coefficients(self, weights: Weights) -> LayerCoefficients:
        patterns: list[Pattern] = []
        freeze = self.trace.freeze(self.module, self.options, name=self.name, keep=patterns.append)
        with freeze as mode, torch.no_grad():
            mode.graph, mode.takes_values = False, takes_values(self.options, self.trace.sequence)
            reader = CoefficientReader(mode, self.module, weights)
            with hooked((*reader.hooks(), *self._hook_known_attention(mode, weights))):
                hidden = self.call.hidden.clone()
                mode.enter(hidden, self.call.value)
                self.call(hidden)
        coefficients = reader.coefficients(patterns[-1])
        assert coefficients is not None  # they were read when the prompt was traced
        return coefficients

    def _hook_known_attention(self, mode: Frozen, weights: Weights) -> list[RemovableHandle]:
        """Let the attention give what it gave in the trace, if these are the model's own bits, and not compute it."""
        path, known = self.call.block.sublayers.attn, self.trace.attn_out[self.index]
        if not mode.takes_values or path is None or known is None or not weights.o.startswith(f"{path}."):
            return []

        def enter(_module: nn.Module, _args: object) -> None:
            mode.skips_mixing = True

        def leave(_module: nn.Module, _args: object, output: object) -> object:
            mode.skips_mixing, again = False, known.clone()  # a layer may add to it in place
            mode.enter(again)
            return with_hidden_output(output, again)

        attention = self.module.get_submodule(path)
        return [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]

    def graph(self, collect: bool = False, finder: Finder | None = None) -> Graph:
        """Its graph, with leaves for constants if `collect`; `finder` looks inside. Cost: two forward passes."""
        if self.trace.sequence.fallback_reason is not None:
            return network_graph(self.trace, self.options, collect)
        self.trace.check_weights(self.module)
        sublayers, seen = self.call.block.sublayers, dict[str, Tensor]()
        keep = None if finder is None else finder.keep
        freeze = self.trace.freeze(self.module, self.options, name=self.name, collect=collect, keep=keep)
        with freeze as mode, torch.no_grad():
            hidden = self.call.hidden.clone()
            x = mode.enter(hidden, self.call.value.clone().requires_grad_())
            shift = torch.zeros_like(x, requires_grad=True)

            def leave_attention(_module: nn.Module, _args: object, output: object) -> None:
                with mode.paused():
                    seen["attn_out"] = mode.live(hidden_output(output)) + shift
                    mode.enter(hidden_output(output), seen["attn_out"])

            def leave_mlp(_module: nn.Module, _args: object, output: object) -> None:
                with mode.paused():  # a copy: some layers add to it in place
                    seen["mlp_out"] = mode.live(hidden_output(output)).clone()

            handles = [
                self.module.get_submodule(path).register_forward_hook(hook)
                for path, hook in ((sublayers.attn, leave_attention), (sublayers.mlp, leave_mlp))
                if path is not None
            ]
            if finder is not None:
                handles += finder.hooks(mode, self.module, self.name)
            with hooked(handles):
                rerun = self.call(hidden)
                post = mode.live(rerun)
        check_reproduced(self.trace, rerun, self.trace.layer_input(self.index + 1), self.name)
        points = {"resid_pre": x, "resid_post": post, **seen}
        if "attn_out" in seen:
            points["resid_mid"] = x + seen["attn_out"]
        return Graph(points, shift, mode.constants)

    def vjp(
        self, cotangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Pull cotangents from `target` back to `source`; yields `chunk` columns at a time. Cost: n of this layer."""
        return map(self.puller(source, target), split(cotangents, chunk))

    def puller(self, source: str, target: str) -> Product:
        """A function that pulls some columns from `target` back to `source`. Cost: two forward passes."""
        graph = self._graph_with(source, target)
        y, x = graph.points[target], graph.source(source)
        return lambda part: batched_vjp(y, x, part.to(self.device).unsqueeze(1)).squeeze(1)

    def jvp(
        self, tangents: Columns, source: str = "resid_pre", target: str = "resid_post", chunk: int | None = None
    ) -> Iterator[Columns]:
        """Push tangents from `source` forward to `target`; chunks and cost as for `vjp`."""
        return map(self.pusher(source, target), split(tangents, chunk))

    def pusher(self, source: str, target: str) -> Product:
        """A function that pushes some columns from `source` forward to `target`. Cost: two forward passes."""
        graph = self._graph_with(source, target)
        push = batched_jvp(graph.points[target], graph.source(source))
        return lambda part: push(part.to(self.device).unsqueeze(1)).squeeze(1)

    def constants(self, source: str = "resid_pre", target: str = "resid_post") -> dict[str, Float[Tensor, "T d"]]:
        """What each bias or other constant inside the layer, behind `source`, adds at `target`; by its path."""
        graph = self._graph_with(source, target, collect=True)
        if source == "resid_mid" and graph.parallel:
            return {f"{self.name}: the MLP beside the attention": graph.points["mlp_out"].detach()[0]}
        return push_constants(graph.constants_from(source), graph.points[target], lambda block: block[:, 0])

    def _graph_with(self, source: str, target: str, collect: bool = False) -> Graph:
        """The layer's graph, if the layer has both points."""
        for kind in (source, target):
            if kind not in ("resid_pre", "resid_post"):
                self.trace.sublayer_path(self.index, "mlp_out" if kind == "mlp_out" else "attn_out")
        return self.graph(collect)


def split(block: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    """A block in chunks of columns; none of an empty one."""
    return block.split(chunk or len(block)) if len(block) else ()


def _to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
