"""The layers' links in order, y = R L_n ... L_1 x + b: sweeps u -> L_1^T ... L_n^T R^T u and v -> R L_n ... L_1 v.

R is the final norm and the head as far as the target includes them (`loclin.network.ends`). Cost is counted in columns:
one column is one vector pushed through all T positions of every layer between source and target, 2 T P flops where P
counts the V, O, up and down weights of those layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.errors import OptionError
from loclin.freeze import FreezeOptions, Precision
from loclin.network.blocks import CausalBlock, Workspace
from loclin.network.ends import NormLink, Readout
from loclin.network.explicit import ExplicitLayer
from loclin.network.link import LayerLink, Product, split
from loclin.network.points import Point, Span
from loclin.network.trace import Trace
from loclin.results.sweep_file import SweepFile

_CHUNK_ROWS = 1600
"""Rows (columns times positions) of one matrix product on a CPU: enough for its full speed; more only takes more
memory."""
_CHUNK_COLUMNS = 4  # of long prompts: a product with attention probabilities has columns times d_head
_CHUNK_ROWS_ACCELERATOR = 65536


class Chain:
    """The links of one traced prompt, frozen as `options` say (as in the trace by default).

    `explicit` uses explicit products (see `loclin.network.explicit`) where the family has them.
    """

    def __init__(self, trace: Trace, options: FreezeOptions | None = None, explicit: bool = True) -> None:
        self.trace, self.options, self.explicit = trace, options or trace.options, explicit
        self.layers = [LayerLink(trace, index, self.options) for index in range(trace.n_layers)]

    @property
    def precision(self) -> Precision:
        """That of the sweeps: `"single"` where products were to be split, and are not."""
        trace = self.trace
        asked = trace.options.resolved(trace.sequence.dtype)
        splits = self.explicit and self.options == trace.options and any(trace.split.layers)
        return "single" if asked == "split" and not splits else asked

    def width(self, target: Point, normed: bool = False) -> int:
        """d_out of a target: d, that of `final`, or the size of the vocabulary."""
        return self.readout(target, -1, normed).width

    def chunk(self, columns: int, most: int) -> int:
        """How many columns go through a layer at a time: equal parts of at most `most`, that fill a product."""
        on_cpu = self.trace.layers[0].hidden.device.type == "cpu"
        rows = _CHUNK_ROWS if on_cpu else _CHUNK_ROWS_ACCELERATOR
        parts = math.ceil(columns / max(1, min(most, max(_CHUNK_COLUMNS, math.ceil(rows / self.trace.length)))))
        return math.ceil(columns / max(1, parts))

    def check(self, source: Point, target: Point) -> None:
        """Refuse, by an OptionError, a target that the source does not lead to, and `final` or `logits` as a source."""
        n = self.trace.n_layers
        before, after = source.node(n), target.node(n)
        if source.kind in ("final", "logits"):
            raise OptionError(f"source {source}: choose a source before the final norm")
        if source != target and (after < before or (after == before and not target.on_stream)):
            raise OptionError(f"target {target} is not downstream of source {source}: choose a later target")

    def is_parallel(self, index: int) -> bool:
        """Whether a layer's MLP is parallel to its attention; no layer with explicit products has one."""
        return not self.trace.explicit[index] and self.layers[index].parallel

    def column_bytes(self, target: Point) -> int:
        """An upper estimate of the memory of one column inside a sweep, in bytes.

        The widest moment is inside an MLP: its inner width four times over (the cotangent, its two branches and the
        copy that the matrix product makes), and six residual streams. Where products are split, three times more: the
        pieces of a factor.
        """
        widest = max(
            (part.out_features for part in self.trace.layers[0].block.module.modules() if isinstance(part, nn.Linear)),
            default=4 * self.trace.width,
        )
        inside = self.trace.length * ((7 if self.trace.split.layers else 4) * widest + 6 * self.trace.width)
        return (inside + 2 * self.width(target)) * self.trace.dtype.itemsize

    def backward(
        self,
        cotangents: Float[Tensor, "n d_out"],
        span: Span,
        chunk: int | None = None,
        halves: bool = False,
        kept: SweepFile | None = None,
    ) -> Iterator[Float[Tensor, "n T d"]]:
        """Pull a block of cotangents at a target, one position, back to all positions of the source.

        `chunk` columns go through a layer at a time. Yields the cotangents before every link on the way, with `halves`
        at `resid_mid` too, in one tensor that is overwritten by the next; the last are those at `source`. Where `kept`
        has the state of this sweep, it goes on from there.

        Cost: n columns. Memory: `[n, T, d]`, and what a chunk needs inside a layer.
        """
        trace, position = self.trace, span.position
        # R^T u, at the target's position; all other positions have no cotangent yet.
        at_position = self.readout(span.target, position, span.normed).vjp(cotangents)
        # Laid out as [T, n, d], and seen as [n, T, d]: what belongs to one position is then one matrix.
        pulled = at_position.new_empty((trace.length, len(at_position), trace.width)).transpose(0, 1)
        state = None if kept is None else kept.read(pulled)
        done, active, workspace = *(state or (0, slice(position, position + 1))), Workspace()
        if state is None:
            pulled.zero_()[:, position] = at_position
        yield pulled
        # L_l^T, from the last layer to the first. Each attention spreads the cotangents over more positions.
        steps = self.steps(span.source, span.target, halves)[::-1]
        for number, (index, below, above) in enumerate(steps[done:], done + 1):
            if halves and self.is_parallel(index):
                # A parallel MLP reads the layer's input: it is passed in one step with the attention.
                below, above = ("resid_post" if below == "resid_mid" else below), "resid_post"
            if below != above:
                active = self.pull(pulled, index, below, above, active, workspace, chunk)
            if kept is not None:
                kept.note(number, active, pulled)
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
        """Pull cotangents through one layer, in place; returns the positions that they have reached.

        The block is a transposed `[T, n, d]`, zero outside the `active` positions. Cost: n columns of the layer.
        """
        layer, trace = self.explicit_layer(index, workspace), self.trace
        reached = slice(0, active.stop if trace.causal else trace.length)
        if layer is not None and len(block):
            layer.vjp(block.transpose(0, 1), active, reached, chunk, below, above)
        else:
            _apply(self.layers[index], LayerLink.puller, block, below, above, chunk)
        return reached if below == "resid_pre" else active

    def forward(self, tangents: Float[Tensor, "n T d"], span: Span, chunk: int | None = None) -> Iterator[Tensor]:
        """Push a block of tangents at all positions of the source to the target at one position.

        Yields the tangents behind every layer on the way, `[n, T, d]`, in one tensor that is overwritten by the next;
        the last is the result `[n, d_out]`. Cost: n columns. Memory: as for `backward`.
        """
        trace, position, workspace = self.trace, span.position, Workspace()
        # A copy laid out as [T, n, d], and seen as [n, T, d].
        pushed = tangents.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        steps = self.steps(span.source, span.target)
        seen = slice(0, position + 1 if trace.causal else trace.length)  # what the target can depend on
        for index, below, above in steps:
            layer = self.explicit_layer(index, workspace)
            if layer is not None and len(pushed):
                is_last = index == steps[-1][0]
                wanted = slice(position, position + 1) if is_last else seen
                layer.jvp([CausalBlock(0, pushed.transpose(0, 1)[seen])], wanted, chunk, below, above)
            else:
                _apply(self.layers[index], LayerLink.pusher, pushed, below, above, chunk)
            yield pushed
        yield self.readout(span.target, position, span.normed).jvp(pushed[:, position])

    def explicit_layer(self, index: int, workspace: Workspace) -> ExplicitLayer | None:
        """A layer's explicit products, where it has them."""
        return self.layers[index].explicit(workspace) if self.explicit else None

    def constants(self, span: Span, by_source: bool = False) -> dict[str, Float[Tensor, " d_out"]]:
        """What does not come from the source: every bias behind it, pushed to the target.

        Where the source is added to the residual stream (`attn_out`, `mlp_out`), the rest of the stream is one of the
        constants. With `by_source` one vector for each, else their sum under the name `"sum"`.

        Cost: one column; with `by_source` as many as there are biases.
        """
        trace, (source, target, position, normed) = self.trace, span
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
                _apply(self.layers[index], LayerLink.pusher, block, below, above, None)
            if trace.biased[index] or self.options != trace.options:
                add(self.layers[index].constants(below, above))
        readout = self.readout(target, position, normed)
        found = dict(zip(names, readout.jvp(block[:, position]), strict=True)) | readout.constants()
        return found if by_source else {"sum": self.total(found, target, normed)}

    def total(self, found: dict[str, Tensor], target: Point, normed: bool) -> Float[Tensor, " d_out"]:
        """The sum of vectors at a target, on the device of the first layer."""
        device = self.trace.layers[0].hidden.device
        zero = torch.zeros(self.width(target, normed), dtype=self.trace.dtype, device=device)
        return sum((value.to(device) for value in found.values()), start=zero)

    def norm(self, target: Point, position: int | list[int]) -> NormLink:
        """The final norm on top of a target, frozen at the target's own value; at several positions together."""
        return Readout(self.trace, self.options, target, position, normed=True).norm()

    def readout(self, target: Point, position: int, normed: bool = False) -> Readout:
        """From the residual stream to a target: the final norm and the head, as far as the target includes them."""
        return Readout(self.trace, self.options, target, position, normed)

    def steps(self, source: Point, target: Point, halves: bool = False) -> list[tuple[int, str, str]]:
        """(layer, from its point, to its point) in forward order; `halves` of layers meet at `resid_mid`."""
        n = self.trace.n_layers
        if source == target:
            return []
        node, end = source.node(n), min(target.node(n), 2 * n)
        steps = []
        while node < end:
            layer = node // 2
            above = min(node + 1 if halves else 2 * layer + 2, end)
            is_last = above == end and not target.on_stream
            names = ("resid_pre", "resid_mid", "resid_post")
            steps.append((layer, names[node - 2 * layer], target.kind if is_last else names[above - 2 * layer]))
            node = above
        return steps


def _apply(
    link: LayerLink,
    product: Callable[[LayerLink, str, str], Product],
    block: Tensor,
    below: str,
    above: str,
    chunk: int | None,
) -> None:
    """Put a block through one link in chunks, in place: the whole block is held once."""
    link.each(
        lambda own: product(own, below, above), lambda through, part: part.copy_(through(part)), split(block, chunk)
    )
