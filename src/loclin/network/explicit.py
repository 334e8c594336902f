"""Explicit products: a layer's jvp and vjp from its weights and frozen coefficients, without autograd.

With frozen coefficients a layer is the affine map y = z + M(z), z = x + A(x), with an attention A that mixes positions
(`loclin.network.explicit_attention`) and an MLP M that is one matrix at each position (`loclin.network.explicit_mlp`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.common.brief import brief
from loclin.freeze.quantised import dense_weight, has_dense_weight
from loclin.models.crew import Crew
from loclin.models.lease import weights_of
from loclin.network.anatomy import Weights
from loclin.network.blocks import CausalBlock, LayerCoefficients, Probe, Workspace, add_or_write
from loclin.network.explicit_attention import ExplicitAttention
from loclin.network.explicit_mlp import ExplicitMLP
from loclin.network.matrix import Matrix
from loclin.network.split import Split

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far an explicit layer's value may be from the frozen layer's own."""


Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Others:
    """The same layer on the other devices of a crew; `make` makes it for a worker, once."""

    crew: Crew
    home: int
    make: Callable[[int], ExplicitLayer]
    _made: dict[int, ExplicitLayer] = field(default_factory=dict)

    __repr__ = brief

    def layer(self, worker: int) -> ExplicitLayer:
        """The layer on the device of a worker other than `home`."""
        if worker not in self._made:
            self._made[worker] = self.make(worker)
        return self._made[worker]


def available(layer: nn.Module, weights: Weights, dtype: torch.dtype) -> bool:
    """Whether a layer has every part that its family's entry names, with a weight that can be read."""
    modules = dict(layer.named_modules())
    if dtype not in AGREEMENT or any(path not in modules for path in weights.paths):
        return False
    return all(has_dense_weight(modules[path]) for path in weights.matrices)


class ExplicitLayer:
    """One layer's explicit products, of blocks `[T, n, d]`: what belongs to one position is one matrix.

    Memory: the workspace of the sweep, which holds the weights once more where they are stored in another dtype and
    many rows pass. There is one such layer at a time for each workspace.
    """

    def __init__(
        self,
        layer: nn.Module,
        weights: Weights,
        coefficients: LayerCoefficients,
        dtype: torch.dtype,
        shared: Workspace,
        split: Split | None = None,
        others: Others | None = None,
        is_other: bool = False,
    ) -> None:
        self._layer, self._dtype, self._workspace, matrix = layer, dtype, shared, self.matrix
        self._is_split, self._others, self._is_other = split is not None, others, is_other
        with weights_of(layer, _used(weights, coefficients)):
            o, down = matrix("o", weights.o), matrix("down", weights.down)
            v_rows = gate_rows = up_rows = slice(None)
            if weights.fused:  # q, k and v lie one behind the other, k as wide as v; and the gate before up
                outputs, inner = layer.get_submodule(weights.v).out_features, down.shape[1]
                assert isinstance(outputs, int)
                v_rows = slice(-(outputs - o.shape[1]) // 2, None)
                gate_rows, up_rows = slice(inner), slice(inner, None)
            v = matrix("v", weights.v, v_rows)
            # A branch through which nothing flows is never read.
            up = None if coefficients.up is None else matrix("up", weights.up, up_rows)
            gate = None if coefficients.gate is None else matrix("gate", weights.gate, gate_rows)
        self._attention = ExplicitAttention(v, o, coefficients, shared)
        self._mlp = ExplicitMLP(up, gate, down, coefficients, shared, split is not None and split.formed)
        self._before_attention = coefficients.attn_in
        self.biased = self._attention.biased or self._mlp.biased

    def matrix(self, name: str, path: str, rows: slice = slice(None)) -> Matrix:
        """A linear module's matrix, or some rows of it."""
        weight, bias = dense_weight(module := self._layer.get_submodule(path)), module.bias
        assert weight is not None
        own = bias[rows] if isinstance(bias, Tensor) else None
        return Matrix(name, weight[rows], own, self._dtype, self._workspace, self._is_split, self._is_other)

    def _each(self, work: Callable[[ExplicitLayer, Unit], object], units: Sequence[Unit]) -> None:
        """Do the work of each unit, with this layer or the same one on another device."""
        if self._others is None:
            for unit in units:
                work(self, unit)
            return
        others = self._others
        others.crew.deal(
            lambda worker: self if worker == others.home else others.layer(worker), work, units, others.home
        )

    def vjp(
        self,
        block: Float[Tensor, "T n d"],
        active: slice,
        reached: slice,
        chunk: int | None = None,
        below: str = "resid_pre",
        above: str = "resid_post",
    ) -> None:
        """Pull cotangents from point `above` back to `below` (`resid_pre` or `resid_mid`), in place.

        `active` positions have cotangents, others zeros; they attend to those `reached`. `chunk` columns at a time.

        Cost: 2 T d^2 (f + n) flops for the MLP with its matrices formed, 4 n T d f with its factors; 2 n T d d_head
        (H + H_kv) for V and O, 2 n T^2 H d_head for mixing.
        """
        # x + A(x) and z + M(z): the stream keeps its cotangent, except where the target is what a sublayer adds.
        if above in ("mlp_out", "resid_post"):
            groups = self._mlp.groups(active, block.shape[1])
            self._each(lambda layer, group: layer._mlp.vjp(block, group, above == "resid_post"), groups)
        if below == "resid_pre":
            parts = block.split(chunk or block.shape[1], dim=1)
            self._attention.hold(active, len(parts))
            self._each(lambda layer, part: layer._pull_attention(part, active, reached, above), parts)

    def _pull_attention(self, part: Tensor, active: slice, reached: slice, above: str) -> None:
        pulled = self._attention.vjp(part[active], active, reached)
        if above == "attn_out":
            part[active] = 0
        stream, moved, before = part[reached], pulled.to(part.device), self._before_attention
        if before is None:
            stream += moved
        else:
            stream.addcmul_(moved, before[reached, None].to(part.device))

    def jvp(
        self,
        blocks: Sequence[CausalBlock],
        wanted: slice,
        chunk: int | None = None,
        below: str = "resid_pre",
        above: str = "resid_post",
        probe: Probe | None = None,
    ) -> None:
        """Push blocks of tangents from `below` to `above`, in place; the MLP's matrices are formed once for all.

        Only the `wanted` positions are right afterwards, and those behind the last of them must not matter. Cost: as
        for `vjp`, V at all positions and the rest at those wanted.
        """
        if below == "resid_pre":
            add = above != "attn_out"
            if self._attention.folding_pays(blocks, wanted):
                self._attention.push_folded(blocks, wanted, add, probe)
            else:
                parts = [
                    (index, slice(first, first + (chunk or n)))
                    for index, n in enumerate(block.shape[1] for _, block in blocks)
                    for first in range(0, n, chunk or n)
                ]
                if len(blocks) == 1:
                    self._attention.hold(slice(max(wanted.start, blocks[0].start), wanted.stop), len(parts))
                self._each(lambda layer, part: layer._push_attention(blocks, *part, wanted, add, probe), parts)
        if above in ("mlp_out", "resid_post"):
            groups = self._mlp.groups(wanted, sum(block.shape[1] for _, block in blocks))
            self._each(lambda layer, group: layer._mlp.jvp(blocks, group, above == "resid_post", probe), groups)

    def _push_attention(
        self,
        blocks: Sequence[CausalBlock],
        index: int,
        columns: slice,
        wanted: slice,
        add: bool,
        probe: Probe | None,
    ) -> None:
        start, part = blocks[index].start, blocks[index].block[:, columns]
        rows = slice(max(wanted.start, start), wanted.stop)
        pushed = self._attention.jvp(part, start, rows)
        if probe is not None and rows.start <= probe.position < rows.stop:
            probe.record(index, "attn_out", columns, pushed[probe.position - rows.start])
        add_or_write(part[rows.start - start : rows.stop - start], pushed, add)

    def affine(
        self, x: Float[Tensor, "T d"], wanted: slice = slice(None)
    ) -> tuple[Float[Tensor, "W d"], Float[Tensor, "W d"]]:
        """What attention and MLP add to an input at the wanted positions, biases included. Cost: one column."""
        block, wanted = x.to(self._mlp.device)[:, None], slice(*wanted.indices(len(x))[:2])
        attended = self._attention.jvp(block, 0, wanted, affine=True)
        moved = self._mlp.push_through_factors(block[wanted] + attended, wanted, affine=True)
        return attended[:, 0], moved[:, 0]

    def value(self, x: Float[Tensor, "T d"], wanted: slice = slice(None)) -> Float[Tensor, "W d"]:
        """The layer's value at an input and the wanted positions, biases included. Cost: one column."""
        attended, moved = self.affine(x, wanted)
        return x[wanted].to(self._mlp.device) + attended + moved


def _used(weights: Weights, coefficients: LayerCoefficients) -> list[str]:
    """The paths of the matrices that something flows through; any other need not be in memory."""
    frozen = set()
    if not weights.fused:
        branches = ((weights.gate, coefficients.gate), (weights.up, coefficients.up))
        frozen = {path for path, factors in branches if factors is None}
    return [path for path in weights.matrices if path not in frozen]
