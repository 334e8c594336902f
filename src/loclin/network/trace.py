"""A traced prompt: what enters each layer, and the network's value at each point."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.sums import relative_error
from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import FreezeOptions, Frozen, NonlinearUse, frozen
from loclin.freeze.mode import Keep
from loclin.models.forward import at_all_tokens, hidden_output, hooked, logits_at
from loclin.models.model import Model
from loclin.models.snapshot import Snapshot
from loclin.network.anatomy import Anatomy
from loclin.network.autograd import Constants
from loclin.network.blocks import LayerCoefficients
from loclin.network.points import Point
from loclin.network.sequence import Block, BlockSequence
from loclin.network.split import Split

_ROUNDINGS, _SINGLE = 32, torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class BlockCall:
    """How a block was called."""

    block: Block
    hidden: Tensor  # its input [1, T, d] as the model has it, from which coefficients are made
    value: Tensor  # in the frozen network: the same numbers, unless the linear path has another dtype
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    __repr__ = brief

    def __call__(self, hidden: Tensor) -> Tensor:
        """Call the block again in the same way, with another hidden state."""
        return hidden_output(self.block.module(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class OutputHead:
    """From `final` to the logits at one position, or at n: both ends of the graph, and its constants."""

    final: Float[Tensor, "*n d"]
    logits: Float[Tensor, "*n V"]
    stock: Float[Tensor, "*n V"]  # the model's own logits
    value: Float[Tensor, "*n V"]  # those of the frozen network
    constants: Constants

    __repr__ = brief


@dataclass
class Trace:
    """A frozen forward pass at one prompt.

    Where the blocks do not pass the hidden state straight to one another, `sequence.fallback_reason` says why, and the
    network from the embeddings to `final` is one layer.
    """

    model: Model  # a replica of the user's, with its hooks, adapters and flags of then; the weights are its own
    weights: Snapshot  # tells whether the weights have changed since
    anatomy: Anatomy
    sequence: BlockSequence
    options: FreezeOptions
    input_ids: Int[Tensor, "1 T"]
    layers: list[BlockCall]
    attn_out: list[Tensor | None]  # each layer's, [1, T, d]; None where no module of the layer gives it
    end: BlockCall  # what enters the modules behind the last layer (the final norm)
    final: Float[Tensor, "1 T d_final"]  # what leaves them
    stock_final: Float[Tensor, "1 T d_final"]  # the untouched model's own
    stock_logits: Float[Tensor, " V"]  # the untouched model's own, at `sequence.predicts`
    bit_identical: bool  # whether the model gave the same inside the freeze, in every bit
    random: bool  # whether it gave something else
    attention_received: Float[Tensor, " T"]
    """By each token from later ones, the mean of all heads; 0 without attention. In a long prompt, whose patterns are
    in blocks, from those later ones that are among `proved_positions`."""
    nonlinear_uses: tuple[NonlinearUse, ...]  # coefficients used as if linear in the input: with any, no map is exact
    explicit: tuple[bool, ...]  # whether a layer has explicit products that rebuild its value
    coefficients: tuple[LayerCoefficients | None, ...]  # of explicit products, where they are kept
    biased: tuple[bool, ...]  # False where explicit products have no biases
    causal: bool  # whether no token attends to a later one
    attention_bytes: int | None = None  # up to which a layer's attention probabilities are made whole; None: always
    split: Split = Split()  # noqa: RUF009 (it is frozen)
    _heads: dict[int, OutputHead] = field(default_factory=dict)

    __repr__ = brief

    @property
    def n_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """T, the number of input tokens."""
        return self.input_ids.shape[1]

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return self.layers[0].hidden.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the linear path, and so of the sweeps."""
        return self.layers[0].value.dtype

    def layer_input(self, index: int) -> Float[Tensor, "1 T d"]:
        """What enters a layer, as the model has it; behind the last layer, what leaves it."""
        return self.layers[index].hidden if index < self.n_layers else self.end.hidden

    def check_weights(self, module: nn.Module) -> None:
        """Refuse, by a ModelError, a part of the model whose weights are not those that were traced."""
        self.weights.check(module, self.model.info.name)

    def check_layers(self) -> None:
        """`check_weights` for all layers at once."""
        self.check_weights(nn.ModuleList(layer.block.module for layer in self.layers))

    def freeze(
        self,
        root: nn.Module,
        options: FreezeOptions,
        *,
        name: str = "",
        collect: bool = False,
        keep: Keep | None = None,
    ) -> AbstractContextManager[Frozen]:
        """`frozen` for the model or a part of it, in the trace's dtype, with patterns as large as it allows."""
        return frozen(
            root, options, self.dtype, name=name, collect=collect, keep=keep, attention_bytes=self.attention_bytes
        )

    def position(self, position: int) -> int:
        """A position counted from the front; PromptError outside the prompt."""
        position = whole("position", position)
        if not -self.length <= position < self.length:
            raise PromptError(
                f"position {position} is outside the prompt, which has {self.length} tokens: give one from 0 to "
                f"{self.length - 1}, or from -{self.length} to -1"
            )
        return position % self.length

    def target_position(self, position: int) -> int:
        """A position at which a map may end; -1 is that of the model's prediction. PromptError for another."""
        at = self.sequence.predicts if whole("position", position) == -1 else self.position(position)
        if at < self.model.encoder_length:
            raise PromptError(
                f"position {position} is a token of the encoder: give one of the decoder's, "
                f"{self.model.encoder_length} to {self.length - 1}"
            )
        return at

    def sublayer_path(self, layer: int, kind: str) -> str:
        """The path, from a layer, of the module whose output is `attn_out` or `mlp_out`; OptionError without one."""
        block = self.layers[layer].block
        path = block.sublayers.mlp if kind == "mlp_out" else block.sublayers.attn
        if path is None:
            raise OptionError(
                f"layer {layer} ({type(block.module).__name__}) has no module whose output is {kind}: use resid_pre "
                "and resid_post"
            )
        return path

    def stream(self, node: int) -> Float[Tensor, "1 T d"]:
        """The residual stream's value at a node (see `Point.node`), before the final norm."""
        layer, mid = divmod(node, 2)
        if layer == self.n_layers:
            return self.end.value
        value = self.layers[layer].value
        return value + self._attention_output(layer).to(value.device) if mid else value

    def _attention_output(self, layer: int) -> Float[Tensor, "1 T d"]:
        added = self.attn_out[layer]
        if added is None:
            self.sublayer_path(layer, "attn_out")
        assert added is not None
        return added

    def value(self, point: Point) -> Float[Tensor, "T n"]:
        """The frozen network's value at a point, at every position: `[T, d]`, or `[T, V]` for the logits."""
        if point.kind == "logits":
            return torch.stack([self.logits(position) for position in range(self.length)])
        if point.kind == "final":
            return self.final[0]
        if point.layer is not None and point.kind == "attn_out":
            return self._attention_output(point.layer)[0]
        node = point.node(self.n_layers)
        if point.layer is not None and point.kind == "mlp_out":
            self.sublayer_path(point.layer, "mlp_out")
            after = self.stream(node)
            return (after - self.stream(node - 1).to(after.device))[0]
        return self.stream(node)[0]

    def logits(self, position: int) -> Float[Tensor, " V"]:
        """The frozen network's logits at one position; soft caps and scales, where the model has them, included."""
        return self.head(position).value

    def head(self, position: int) -> OutputHead:
        """From `final` to the logits at one position. Cost: a forward pass, once for each position."""
        if self.model.task == "classification" and position != self.sequence.predicts:
            raise PromptError(
                f"the classes read the token at position {self.sequence.predicts}, and there are no logits at "
                f"{position}: give -1"
            )
        if position not in self._heads:
            self._heads[position] = self._make_head(position)
        return self._heads[position]

    def heads(self, positions: Sequence[int]) -> OutputHead:
        """From `final` to the logits at n positions. Cost: one forward pass."""
        return self._make_head(list(positions))

    def _make_head(self, at: int | list[int]) -> OutputHead:
        self.check_weights(self.model.hf)
        with torch.no_grad(), self.freeze(self.model.hf, self.options) as mode:
            head, *_ = run_to_logits(mode, self.model, self.input_ids, self.sequence, at, self.final)
        return head

    def double(self) -> Trace:
        """The same trace with sweeps in float64, with the coefficients and values that it has.

        What is far larger at one token than elsewhere (an attention sink) is multiplied by weights that nearly cancel;
        in float32 such a product is the whole sweep's largest error. Cost: a copy of what is remembered; then each
        sweep converts the weights of one layer at a time.
        """
        return replace(
            self,
            layers=[replace(call, value=call.value.double()) for call in self.layers],
            attn_out=[None if added is None else added.double() for added in self.attn_out],
            end=replace(self.end, value=self.end.value.double()),
            final=self.final.double(),
            coefficients=tuple(None if held is None else held.to(torch.float64) for held in self.coefficients),
            split=Split(),
        )


def agrees(rerun: Tensor, traced: Tensor, widened: bool = False) -> bool:
    """Whether values agree up to rounding: threads sum in any order. `widened`: one ran without casts to float32."""
    if torch.equal(rerun, traced):
        return True
    finite, scale = traced.isfinite(), torch.finfo(traced.dtype)
    if not torch.equal(rerun.isfinite(), finite):
        return False
    rerun, traced = (value.masked_fill(~finite, 0) for value in (rerun, traced))  # logits of -inf rule tokens out
    return relative_error(rerun - traced, traced) <= _ROUNDINGS * max(scale.eps, _SINGLE if widened else 0.0)


def takes_values(options: FreezeOptions, sequence: BlockSequence) -> bool:
    """Whether the linear path can take the model's own values (see `Frozen`): both are in float32.

    A float64 model has casts to float32 in it, which the linear path does not follow.
    """
    return options.dtype(sequence.dtype) == sequence.dtype == torch.float32 and not options.ordinary


def run_to_logits(
    mode: Frozen, model: Model, input_ids: Tensor, sequence: BlockSequence, at: int | list[int], final: Tensor | None
) -> tuple[OutputHead, Tensor, Tensor]:
    """Run the model, with a graph from its final hidden state at one position, or at several, to the logits there.

    Returns the head, and the final hidden state at all positions `[1, T, d]`: the frozen network's (or `final`, where
    it is known already), and the model's own. ModelError where that does not depend on the embeddings.
    """
    seen: dict[str, Tensor] = {}
    length, keeps = input_ids.shape[1], mode.options.keeps_stock(sequence.dtype)
    mode.graph = False

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        stock = hidden_output(output)
        if final is None and mode.status(stock) is None:
            return  # a norm that the embeddings pass too
        value = final
        with mode.paused():
            if value is None:
                live = mode.live(stock)  # called in any case: it notes what is not linear
                value = at_all_tokens(model, (stock.detach() if keeps else live).to(mode.dtype), length)
            model_final = at_all_tokens(model, stock.detach(), length)
        leaf = value[0, at].clone().requires_grad_()
        mode.graph = mode.collect = mode.soft_caps = True
        mode.constants.clear()
        with mode.paused():
            others = stock.detach()[:, length - model.encoder_length :].to(value)  # of tokens further ahead
            places = torch.tensor(at, device=leaf.device).reshape(-1)
            entered = torch.cat([value.index_copy(1, places, leaf.reshape(1, len(places), -1)), others], dim=1)
            mode.enter(stock, entered[:, model.encoder_length :])
        seen.update(stock=model_final, final=value, leaf=leaf)

    with hooked([sequence.exit.register_forward_hook(leave)]):
        logits = logits_at(model, input_ids, at)
    if not seen:
        raise ModelError(
            f"{model.info.name}: no operation that loclin sees connects the embeddings to "
            f"{type(sequence.exit).__name__}; load the model with attn_implementation='eager' and without compiled "
            "code or kernels"
        )
    live = mode.live(logits)
    value = logits.to(mode.dtype) if keeps else live.detach()
    return OutputHead(seen["leaf"], live, logits, value, mode.constants), seen["final"], seen["stock"]
