"""Activation patching from a second prompt, at all points at once: as the frozen map says, and checked by runs.

An activation a at one point and token becomes a', what it is in the other prompt. Under the freeze the target changes
by exactly g . (a' - a), with its gradient g there along all paths. One sweep down has every g.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.readout import Readout
from loclin.analyses.attribution.shares import find_active, list_additions, list_steps, new_block, pull_down
from loclin.analyses.attribution.target import Target
from loclin.analyses.intervene import (
    Effect,
    LayerParts,
    check_alike,
    parse_replaced,
    read_for_runs,
    replace_each,
)
from loclin.analyses.prompt_comparison import contrast
from loclin.common.arguments import whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question
from loclin.network.autograd import grad
from loclin.network.blocks import Workspace
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns

Parts = Literal["layer", "head"]
Row = tuple[str, Float[Tensor, " T"]]
"""A point's name, and the change by each token."""


@dataclass(frozen=True)
class Patching(Result):
    """What each activation of a second prompt would change of a target; made by `loclin.patch`.

    Attributes
    ----------
    by: whether points are parts of layers, or heads.
    target: as in `Attribution`, in the first prompt.
    value: the same number in the second prompt.
    points: `resid_pre.3` (the residual stream before layer 3), `attn_out.3`, `mlp_out.3`, and `resid_post` of the last
        layer; or `L3H5`.
    changes: the change of the target by each point at each token `[points, T]`, exact under the freeze, in float64.
        They overlap: what a point changes goes through all later ones.
    checked: the largest of each kind, run in the model; `L3H5@4` is the point at token 4.
    predicted: the model's most probable next token in the first prompt, with its probability; None if nothing was run.
    second: the provenance of the second prompt.
    """

    by: Parts
    target: dict[str, Any]
    value: float
    points: list[str]
    changes: Float[Tensor, "points T"]
    checked: list[Effect]
    predicted: tuple[str, float] | None
    second: Provenance
    provenance: Provenance
    warnings: list[str] = field(default_factory=list)

    derived = ("change",)

    @property
    def change(self) -> float:
        """The change of the target from the first prompt to the second."""
        return self.value - float(self.target["value"])

    @property
    def kinds(self) -> list[str]:
        """The kinds of points, in order: `resid_pre`, `attn_out`, `mlp_out` and `resid_post`, or `head`."""
        return list(dict.fromkeys(map(_kind, self.points)))

    def matrix(self, kind: str) -> tuple[Float[Tensor, "rows T"], list[str]]:
        """Return the changes by all points of one kind, and the points' names, from the first layer up."""
        rows = [i for i, point in enumerate(self.points) if _kind(point) == kind]
        if not rows:
            raise OptionError(f"kind {kind!r}: choose one of {', '.join(self.kinds)}")
        return self.changes[rows], [self.points[i] for i in rows]

    def top(self, k: int, kind: str) -> list[tuple[str, int, float]]:
        """Return the k largest changes by absolute value of one kind of points: the point, the token, the change."""
        matrix, names = self.matrix(kind)
        order = matrix.abs().flatten().argsort(descending=True, stable=True)[:k].tolist()
        length = matrix.shape[1]
        return [(names[i // length], i % length, matrix.flatten()[i].item()) for i in order]

    def table(self) -> dict[str, list[Any]]:
        """One row per point and token: both texts, the change, and what a run of the model says, if there was one."""
        texts, others = self.provenance.tokens, self.second.tokens
        runs = {effect.name: effect for effect in self.checked}
        rows = (
            (point, i, texts[i], others[i], change, run and run.model, run and run.predicted, run and run.probability)
            for point, row in zip(self.points, self.changes.tolist(), strict=True)
            for i, change in enumerate(row)
            for run in [runs.get(place(point, i))]
        )
        return make_columns("point token text other frozen model predicted probability", rows)


def place(point: str, token: int) -> str:
    """The name of a point at one token."""
    return f"{point}@{token}"


@question
@with_progress
def patch(
    lin: Linearized,
    other: Linearized,
    target: Target = None,
    *,
    by: str = "layer",
    position: int = -1,
    verify: int = 0,
    progress: Progress = True,
) -> Patching:
    """Replace each activation by that of a second prompt: what the frozen map says of every point and token at once.

    Cost: by layer one column backward, and two forward passes of each layer without explicit products; by head a graph
    of each layer in both prompts (four forward passes), and a column. With `verify` a graph of each layer that has a
    checked point, in both prompts, and a forward pass for each. Memory: one layer's graph, or two.

    Raises PromptError for prompts of different lengths, or a position outside the prompt; OptionError for models of
    other shapes, a model whose layers or heads cannot be told apart, an unknown `by`, or a target that is not read at
    the logits or at `final`.

    Parameters
    ----------
    lin: the prompt whose target is looked at, from `loclin.linearize`.
    other: the prompt of as many tokens from which activations are taken, of the same model or of one of the same shape.
    target: see `loclin.attribute`; a span must be in the prompt. None: the token that the second predicts against the
        one that the first predicts; where both predict the same, its logit minus the mean of all.
    by: `"layer"`: the residual stream before each layer, and what each attention and MLP adds to it. `"head"`: what
        each query head gives to the output projection.
    position: the position at which the target is read.
    verify: how many of the largest changes of each kind of points to check by a run of the model.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    if by not in get_args(Parts):
        raise OptionError(f"by={by!r}: choose layer or head")
    check_alike(lin, other)
    verify, tell = whole("verify", verify, 0), steps(progress)
    if (why := lin.trace.sequence.fallback_reason) is not None:
        raise OptionError(f"{lin.model.info.name} has no layers to tell apart: {why}")
    readout = read_for_runs(lin, contrast(lin, other, target), position)
    tell("what the frozen map says")
    rows, notes = (
        _patch_heads(lin, other, readout) if by == "head" else ([*_patch_layers(lin, other, readout)][::-1], [])
    )
    if not rows:
        raise OptionError(f"{lin.model.info.name}: {notes[0]}; use by='layer'")
    assert readout.read is not None
    at = list(readout.positions)
    found = Patching(
        by="head" if by == "head" else "layer",
        target=readout.to_dict(),
        value=readout.read(torch.stack([other.trace.logits(i) for i in at]), other.trace.final[0, at]),
        points=[name for name, _ in rows],
        changes=torch.stack([row.cpu() for _, row in rows]),
        checked=[],
        predicted=None,
        second=other.jacobian(position=readout.position).provenance(),
        provenance=replace(lin.jacobian(position=readout.position).provenance(), target=readout.at),
        warnings=list(dict.fromkeys([*lin.warnings, *other.warnings, *readout.warnings, *notes])),
    )
    return _check(lin, other, readout, found, verify, tell) if verify else found


def _patch_layers(lin: Linearized, other: Linearized, readout: Readout) -> Iterator[Row]:
    """Pull the target's gradient down; at each point, from the last one on, it meets the change of the activation."""
    trace, chain, workspace, active = lin.trace, lin.chain, Workspace(), find_active(lin.trace, readout)
    block = new_block(trace, 1)
    block[0] = readout.cotangent
    last = trace.n_layers - 1
    yield f"resid_post.{last}", _change(block[0], trace.end.value[0], other.trace.end.value[0])
    for index, _, above in list_steps(chain, readout):
        values, others = dict(list_additions(trace, index, above)), dict(list_additions(other.trace, index, above))
        halves = values.keys() >= {"attn_out", "mlp_out"} and not chain.is_parallel(index)
        if "mlp_out" in values:
            yield f"mlp_out.{index}", _change(block[0], values["mlp_out"], others["mlp_out"])
        if halves:  # what attention adds passes the MLP, too
            chain.pull(block, index, "resid_mid", above, active, workspace)
        if "attn_out" in values:
            yield f"attn_out.{index}", _change(block[0], values["attn_out"], others["attn_out"])
        chain.pull(block, index, "resid_pre", "resid_mid" if halves else above, active, workspace)
        yield f"resid_pre.{index}", _change(block[0], trace.layers[index].value[0], other.trace.layers[index].value[0])


def _change(
    gradient: Float[Tensor, "*shape n"], value: Float[Tensor, "*shape n"], other: Float[Tensor, "*shape n"]
) -> Float[Tensor, "*shape"]:
    moved = other.to(gradient.device).double() - value.to(gradient.device).double()
    return (gradient.double() * moved).sum(-1)


def _patch_heads(lin: Linearized, other: Linearized, readout: Readout) -> tuple[list[Row], list[str]]:
    """The changes by each query head; and notes about layers that have none."""
    rows: list[Row] = []
    missing: list[int] = []
    for layer, above, cotangent in pull_down(lin.chain, readout):
        if layer is None:
            continue
        here, there = LayerParts(lin, layer), LayerParts(other, layer)
        found, new = here.projection("attn_out"), there.projection("attn_out")
        if found is None or new is None:
            missing.append(layer)
            continue
        output = here.graph.points[above]
        (pulled,) = grad(output, found.source, cotangent.to(output), retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(found.source) if pulled is None else pulled
        shape = (lin.trace.length, found.count, -1)
        moved = _change(*(part.detach().reshape(shape) for part in (gradient, found.source, new.source)))
        for head, row in reversed([*enumerate(moved.unbind(1))]):
            rows.append((f"L{layer}H{head}", row))
    layers = ", ".join(map(str, sorted(missing)))
    return rows[::-1], [f"No heads can be told apart in layers {layers}."] if missing else []


def _check(lin: Linearized, other: Linearized, readout: Readout, found: Patching, most: int, tell: Any) -> Patching:
    """Run the model with the largest changes of each kind of points."""
    wanted = []
    for kind in found.kinds:
        for point, token, _ in found.top(most, kind):
            wanted.append((replace(parse_replaced(lin, point), name=place(point, token)), [token]))
    predicted, effects = replace_each(lin, readout, wanted, "patch", other, tell)
    return replace(found, checked=effects, predicted=predicted)


def _kind(point: str) -> str:
    kind, dot, _ = point.partition(".")
    return kind if dot else "head"
