"""Links in order: sweeps backward from any target and forward from any source.

Cost is counted in columns: one column is one vector pushed through all T positions of every layer between source and
target, 2 T P flops where P counts the V, O, up and down weights of those layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.errors import OptionError
from loclin.freeze import Hold
from loclin.network.blocks import Started, Workspace
from loclin.network.explicit import ExplicitLayer
from loclin.network.link import HeadLink, LayerLink, NormLink
from loclin.network.points import Point
from loclin.network.trace import Trace

_CHUNK_ROWS = 1600
"""Rows (columns times positions) of one matrix product on a CPU: enough for its full speed; more only takes more
memory."""
_CHUNK_ROWS_ACCELERATOR = 65536


class Chain:
    """The links of one trace.

    Parameters
    ----------
    trace
        The remembered forward pass.
    hold
        What to hold; the trace's own by default. `Hold(ordinary=True)` gives the sweeps of the ordinary Jacobian.
    explicit
        Use explicit products (see `loclin.network.explicit`) where the family has them.
    """

    def __init__(self, trace: Trace, hold: Hold | None = None, explicit: bool = True) -> None:
        self.trace = trace
        self.hold = hold or trace.hold
        self.explicit = explicit
        self.layers = [LayerLink(trace, index, self.hold) for index in range(trace.n_layers)]

    def width(self, point: Point, normed: bool = False) -> int:
        """How many numbers a point has at one position, or `normed` the final norm on top of it.

        d, that of `final`, or the vocabulary's size for the logits.
        """
        if point.kind == "logits":
            return self.trace.stock_logits.shape[0]
        return self.trace.final.shape[-1] if normed or point.kind == "final" else self.trace.width

    def chunk(self, columns: int, most: int) -> int:
        """How many columns go through a layer at a time: equal parts of at most `most`, that fill a product's rows."""
        on_cpu = self.trace.layers[0].hidden.device.type == "cpu"
        rows = _CHUNK_ROWS if on_cpu else _CHUNK_ROWS_ACCELERATOR
        parts = math.ceil(columns / max(1, min(most, math.ceil(rows / self.trace.length))))
        return math.ceil(columns / max(1, parts))

    def check(self, source: Point, target: Point) -> None:
        """Refuse a target that the source does not lead to.

        Raises
        ------
        OptionError
            When the target is upstream of the source, or the source is the logits.
        """
        n = self.trace.n_layers
        before, after = source.node(n), target.node(n)
        if source.kind in ("final", "logits"):
            raise OptionError(f"source {source}: a source lies before the final norm")
        if source != target and (after < before or (after == before and not target.on_stream)):
            raise OptionError(f"target {target} is not downstream of source {source}")

    def column_bytes(self, target: Point) -> int:
        """An upper estimate of the memory of one column inside a sweep, in bytes.

        The widest moment is inside an MLP: its inner width four times over (the cotangent, its two branches and the
        copy that the matrix product makes), and six residual streams.
        """
        widest = max(
            (part.out_features for part in self.trace.layers[0].block.module.modules() if isinstance(part, nn.Linear)),
            default=4 * self.trace.width,
        )
        inside = self.trace.length * (4 * widest + 6 * self.trace.width)
        return (inside + 2 * self.width(target)) * self.trace.dtype.itemsize

    def backward(
        self,
        cotangents: Float[Tensor, "n d_out"],
        source: Point,
        target: Point,
        position: int,
        normed: bool = False,
        chunk: int | None = None,
        halves: bool = False,
    ) -> Iterator[Float[Tensor, "n T d"]]:
        """Pull a block of cotangents at `target`, one position, back to all positions of `source`.

        `chunk` columns go through a layer at a time. Yields the cotangents before every link on the way, with `halves`
        at `resid_mid` too, in one tensor that is overwritten by the next; the last are those at `source`.

        Cost: n columns. Memory: `[n, T, d]`, and what a chunk needs inside a layer.
        """
        trace = self.trace
        if target.kind == "logits":
            cotangents = HeadLink(trace, position).vjp(cotangents)
        if target.kind in ("final", "logits") or normed:
            cotangents = self.norm(target, position).vjp(cotangents)
        # laid out as [T, n, d]: what belongs to one position is then one matrix
        pulled = cotangents.new_zeros((trace.length, len(cotangents), trace.width)).transpose(0, 1)
        pulled[:, position] = cotangents
        active, workspace = slice(position, position + 1), Workspace()
        yield pulled
        for index, below, above in reversed(self.steps(source, target, halves)):
            if halves and not trace.explicit[index] and self.layers[index].parallel:
                # The MLP reads the layer's input: it is passed with the attention.
                below, above = ("resid_post" if below == "resid_mid" else below), "resid_post"
            if below != above:
                active = self.pull(pulled, index, below, above, active, workspace, chunk)
            yield pulled

    def pull(
        self,
        block: Float[Tensor, "n T d"],
        index: int,
        below: str,
        above: str,
        active: slice,
        workspace: Workspace,
        chunk: int | None = None,
    ) -> slice:
        """Pull a block of cotangents through one layer, in place; gives the positions that they have reached.

        The block is a transposed `[T, n, d]`, zero outside the `active` positions. Cost: n columns of the layer.
        """
        layer, trace = self.products(index, workspace), self.trace
        reached = slice(0, active.stop if trace.causal else trace.length)
        if layer is not None and len(block):
            layer.vjp(block.transpose(0, 1), active, reached, chunk, below, above)
        else:
            _through(self.layers[index].vjp, block, below, above, chunk)
        return reached if below == "resid_pre" else active

    def forward(
        self,
        tangents: Float[Tensor, "n T d"],
        source: Point,
        target: Point,
        position: int,
        normed: bool = False,
        chunk: int | None = None,
    ) -> Iterator[Tensor]:
        """Push a block of tangents at all positions of `source` to `target` at one position.

        Yields the tangents behind every layer on the way, `[n, T, d]`, in one tensor that is overwritten by the next;
        the last is the result `[n, d_out]`. Cost: n columns. Memory: as for `backward`.
        """
        trace, workspace = self.trace, Workspace()
        pushed = tangents.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        steps = self.steps(source, target)
        for index, below, above in steps:
            layer = self.products(index, workspace)
            seen = slice(0, position + 1 if trace.causal else trace.length)  # what the target can depend on
            if layer is not None and len(pushed):
                last = index == steps[-1][0]
                wanted = slice(position, position + 1) if last else seen
                layer.jvp([Started(0, pushed.transpose(0, 1)[seen])], wanted, chunk, below, above)
            else:
                _through(self.layers[index].jvp, pushed, below, above, chunk)
            yield pushed
        yield self._leave(pushed[:, position], target, position, normed)

    def products(self, index: int, workspace: Workspace) -> ExplicitLayer | None:
        """A layer's explicit products, where it has them."""
        return self.layers[index].explicit(workspace) if self.explicit else None

    def constants(
        self, source: Point, target: Point, position: int, normed: bool = False, by_source: bool = False
    ) -> dict[str, Float[Tensor, " d_out"]]:
        """What does not come from `source`: every bias behind it, pushed to `target`.

        Where `source` is added to the residual stream (`attn_out`, `mlp_out`), the stream that passes it by is one of
        the constants. With `by_source` one vector for each, else their sum under the name `"sum"`.

        Cost: one column; with `by_source` as many as there are biases.
        """
        trace = self.trace
        names: list[str] = []
        block = torch.zeros(0, trace.length, trace.width, dtype=trace.dtype, device=trace.layers[0].hidden.device)

        def add(found: dict[str, Tensor]) -> None:
            nonlocal names, block
            if found:
                block = torch.cat([block, torch.stack([value.to(block.device) for value in found.values()])])
                names = [*names, *found]
            if not by_source and len(block) > 1:
                names, block = ["sum"], block.sum(0, keepdim=True)

        if source != target and not source.on_stream:
            node = source.node(trace.n_layers) - 1
            add({f"resid past {source}": trace.stream(node)[0]})
        for index, below, above in self.steps(source, target):
            if len(block):
                block = _through(self.layers[index].jvp, block, below, above, None)
            if self.trace.biased[index] or self.hold != self.trace.hold:
                add(self.layers[index].constants(below, above))
        found = dict(zip(names, self._leave(block[:, position], target, position, normed), strict=True))
        if target.kind in ("final", "logits") or normed:
            ends = self.norm(target, position).constants()
            if target.kind == "logits":
                head = HeadLink(trace, position)
                ends = {name: head.jvp(value[None])[0] for name, value in ends.items()} | head.constants()
            found |= ends
        if by_source:
            return found
        device = block.device
        zero = torch.zeros(self.width(target, normed), dtype=trace.dtype, device=device)
        return {"sum": sum((value.to(device) for value in found.values()), start=zero)}

    def norm(self, target: Point, position: int) -> NormLink:
        """The final norm on top of a target, frozen at the target's own value there."""
        if target.kind in ("final", "logits"):
            return NormLink(
                self.trace, self.trace.end.hidden[0, position], self.trace.end.value[0, position], self.hold
            )
        value = self.trace.value(target)[position]
        return NormLink(self.trace, value.to(self.trace.end.hidden.dtype), value, self.hold)

    def _leave(self, pushed: Tensor, target: Point, position: int, normed: bool) -> Tensor:
        if target.kind in ("final", "logits") or normed:
            pushed = self.norm(target, position).jvp(pushed)
        return HeadLink(self.trace, position).jvp(pushed) if target.kind == "logits" else pushed

    def steps(self, source: Point, target: Point, halves: bool = False) -> list[tuple[int, str, str]]:
        """(layer, from its point, to its point) for each layer, or half of one, between two points, in forward order.

        Halves meet at `resid_mid`.
        """
        n = self.trace.n_layers
        if source == target:
            return []
        node, end = source.node(n), min(target.node(n), 2 * n)
        steps = []
        while node < end:
            layer = node // 2
            above = min(node + 1 if halves else 2 * layer + 2, end)
            last = above == end and not target.on_stream
            names = ("resid_pre", "resid_mid", "resid_post")
            steps.append((layer, names[node - 2 * layer], target.kind if last else names[above - 2 * layer]))
            node = above
        return steps


def _through(
    product: Callable[..., Iterator[Tensor]], block: Tensor, below: str, above: str, chunk: int | None
) -> Tensor:
    """Put a block through one link in chunks, in place: the whole block is held once."""
    done = 0
    for part in product(block, below, above, chunk):
        block[done : done + len(part)] = part
        done += len(part)
    return block
