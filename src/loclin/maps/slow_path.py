"""The slow path that a certificate compares a map with: autograd through one layer's graph at a time, row by row.

It has no explicit products, no blocks of columns, no sweeps. The layers are those that the model calls, in its order:
a graph is refused whose value is not the recorded input of the next layer, and the end's if not the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.sums import relative_error
from loclin.freeze import FreezeOptions
from loclin.network.autograd import grad
from loclin.network.graph import check_reproduced
from loclin.network.link import LayerLink
from loclin.network.trace import Trace


class SlowPath:
    """Some rows of the map embed -> final at a position, pulled back from the final norm to the embeddings.

    Cost: for each layer two forward passes, one backward pass for each row, and one more. Memory: one layer's graph.
    """

    def __init__(self, trace: Trace, options: FreezeOptions, position: int, rows: Sequence[int]) -> None:
        self._second = 0.0
        self._pulled: list[Tensor] | None = []
        x, final = _end_graph(trace, options)
        for row in rows:
            cotangent = torch.zeros_like(final)
            cotangent[0, position, row] = 1
            self._pulled.append(cotangent)
        self._pull(x, final)
        for index in reversed(range(trace.n_layers)):
            self._pull(*_layer_graph(trace, index, options))

    @property
    def second_derivative(self) -> float:
        """How strongly a layer's vjp depends on the layer's input, of all layers the most; 0 where they are linear."""
        return self._second

    def row_error(self, rows: Float[Tensor, "n T d"]) -> float:
        """How far rows are from those pulled back, relative to them; 1 where no graph leads to the embeddings."""
        if self._pulled is None:
            return 1.0
        reference = torch.cat([pulled.to(rows.device) for pulled in self._pulled])
        return relative_error(rows - reference, reference)

    def _pull(self, x: Tensor, y: Tensor) -> None:
        """Pull the rows back through one graph, and see whether it is linear."""
        self._second = max(self._second, _second_derivative(x, y))
        if self._pulled is None or not y.requires_grad:
            self._pulled = None
            return
        self._pulled = [
            grad(y, x, row.to(y), retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for row in self._pulled
        ]


def _second_derivative(x: Tensor, y: Tensor) -> float:
    """How strongly the vjp of a graph depends on its input."""
    if not y.requires_grad:
        return 0.0
    (pulled,) = grad(y, x, torch.ones_like(y), create_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return 0.0
    (again,) = grad(pulled.sum(), x, retain_graph=True, allow_unused=True)
    return 0.0 if again is None else relative_error(again * x, pulled.detach())


def _layer_graph(trace: Trace, index: int, options: FreezeOptions) -> tuple[Tensor, Tensor]:
    """A layer's input and output in its graph."""
    graph = LayerLink(trace, index, options).graph()
    return graph.points["resid_pre"], graph.points["resid_post"]


def _end_graph(trace: Trace, options: FreezeOptions) -> tuple[Tensor, Tensor]:
    """What enters and what leaves the modules behind the last layer, in their graph."""
    end = trace.end
    trace.check_weights(end.block.module)
    with trace.freeze(end.block.module, options, name=end.block.name) as mode, torch.no_grad():
        hidden = end.hidden.clone()
        x = mode.enter(hidden, end.value.clone().requires_grad_())
        stock = end(hidden)
        final = mode.live(stock)
    check_reproduced(trace, stock, trace.stock_final, end.block.name)
    return x, final
