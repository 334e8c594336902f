"""Autograd graphs of a layer, or of the whole network, on the linear path: what generic products differentiate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.freeze import FreezeOptions
from loclin.models.forward import (
    Rows,
    all_rows,
    at_all_tokens,
    embedding_tables,
    hidden_input,
    hidden_output,
    hook_embeddings,
    hooked,
    logits_at,
    with_rows,
)
from loclin.models.lease import graph_without_weights
from loclin.network.autograd import Constants, depends_on
from loclin.network.trace import Trace, agrees


@dataclass
class Graph:
    """The linearised values `[1, T, d]` of a layer at its points, with their graph; `resid_pre` is a leaf.

    `attn_shift` is a zero `[1, T, d]` that is added to the attention's output. Moving it moves `resid_mid` and nothing
    before it, so it is the leaf for sources between attention and MLP.
    """

    points: dict[str, Tensor]
    attn_shift: Tensor
    constants: Constants  # the biases and other constants inside, as leaves; empty unless they were collected
    lookups: frozenset[str] = frozenset()  # constants [1, T, ...] of the tokens: rows of any table but the input's

    __repr__ = brief

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads the layer's input, beside the attention, and not what the attention adds to it."""
        mlp = self.points.get("mlp_out")
        return mlp is not None and mlp.requires_grad and not depends_on(mlp, self.attn_shift)

    def source(self, kind: str) -> Tensor:
        """The leaf of a source point, `resid_pre` or `resid_mid`."""
        return self.points["resid_pre"] if kind == "resid_pre" else self.attn_shift

    def constants_from(self, kind: str) -> Constants:
        """The constants that are added behind a source point, `resid_pre` or `resid_mid`."""
        if kind == "resid_pre":
            return self.constants
        return [(name, leaf) for name, leaf in self.constants if self.is_behind_attention(leaf)]

    def is_behind_attention(self, constant: Tensor) -> bool:
        """Whether a constant is added behind the attention, so that `resid_mid` does not contain it yet."""
        return not depends_on(self.points["resid_mid"], constant)


def hook_input(trace: Trace, enter: Callable[[Tensor, Rows, slice], None]) -> list[RemovableHandle]:
    """Call `enter` with the network's input, what enters the first layer or leaves the embeddings.

    And with its rows, and the tokens that they belong to. Each part of the prompt enters once.
    """
    if trace.sequence.fallback_reason is not None:
        return hook_embeddings(trace.model, trace.input_ids, trace.anatomy.decoder, enter)
    waiting = [slice(0, trace.length)]

    def pass_on(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if waiting:
            enter(hidden_input(args, kwargs), all_rows, waiting.pop())

    return [trace.layers[0].block.module.register_forward_pre_hook(pass_on, with_kwargs=True)]


def network_graph(trace: Trace, options: FreezeOptions, collect: bool = False) -> Graph:
    """The whole network from the embeddings to `final`, as one layer. Cost: two forward passes; holds every graph."""
    model, rerun, length = trace.model, dict[str, Tensor](), trace.length
    table = embedding_tables(model)[0]
    trace.check_weights(model.hf)
    x = trace.layers[0].value.detach().clone().requires_grad_()
    points = {"resid_pre": x}
    with trace.freeze(model.hf, options, collect=collect) as mode, torch.no_grad():

        def enter(hidden: Tensor, rows: Rows, tokens: slice) -> None:
            with mode.paused():
                own = x[:, tokens]
                others = with_rows(hidden.to(x.dtype), rows, torch.zeros_like(own))
                mode.enter(hidden, with_rows(mode.constant(others, table.weight, "embedding"), rows, own))

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            with mode.paused():
                points["resid_post"] = at_all_tokens(model, mode.live(hidden_output(output)), length)
            rerun["final"] = at_all_tokens(model, hidden_output(output).detach(), length)
            mode.collect = False

        handles = [*hook_input(trace, enter), trace.sequence.exit.register_forward_hook(leave)]
        handles += mode.look_up(trace.input_ids, model.hf.get_input_embeddings())
        with hooked(handles), graph_without_weights(model.hf):
            logits_at(model, trace.input_ids, length - 1)
    check_reproduced(trace, rerun["final"], trace.stock_final, "the model")
    lookups = frozenset(name for name, _ in mode.lookups.values())
    return Graph(points, torch.zeros_like(x, requires_grad=True), mode.constants, lookups)


def check_reproduced(trace: Trace, rerun: Tensor, traced: Tensor, name: str) -> None:
    """Refuse, by a ModelError, a part of the model whose output is not what it was when the prompt was linearized."""
    if not trace.random and not agrees(rerun, traced.to(rerun.device), trace.options.precision == "double"):
        raise ModelError(
            f"{trace.model.info.name}: {name} no longer gives what it gave when the prompt was linearized: its weights "
            "or a state that it keeps have changed; linearize the prompt again",
            name,
        )
