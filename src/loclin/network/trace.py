"""One forward pass, remembered: what enters each layer, and what the network's value is at each point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.sums import relative
from loclin.common.surroundings import eager_code, in_plain_torch
from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import Frozen, Hold, Misuse, frozen
from loclin.models.model import Model
from loclin.models.snapshot import Snapshot
from loclin.network import explicit
from loclin.network.anatomy import Anatomy, anatomy
from loclin.network.blocks import Workspace
from loclin.network.coefficients import Coefficients, Reader
from loclin.network.points import Point
from loclin.network.route import Block, Parts, Route, as_whole, find_route, first, hidden_state, logits_at

_ROUNDINGS, _SINGLE = 32, torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Call:
    """How a block was called.

    `hidden` is its input `[1, T, d]` as the model has it, of which coefficients are made; `value` is the frozen
    network's own, the same but for the dtype where the linear path has another.
    """

    block: Block
    hidden: Tensor
    value: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    __repr__ = brief

    def __call__(self, hidden: Tensor) -> Tensor:
        """Call the block again as it was called, with another hidden state."""
        return first(self.block.module(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Head:
    """The way from `final` to the logits at one position: both ends of its graph, and its constants.

    `stock` are the logits as the model gives them, `value` those of the frozen network.
    """

    final: Float[Tensor, " d"]
    logits: Float[Tensor, " V"]
    stock: Float[Tensor, " V"]
    value: Float[Tensor, " V"]
    constants: list[tuple[str, Tensor]]

    __repr__ = brief


@dataclass
class Trace:
    """A frozen forward pass at one prompt.

    `model` is a replica of the user's (see `loclin.models.replica`): with the hooks, adapters and flags that were on
    the model when it was traced, whatever is done to the model later. Its weights are the model's own; `weights` tells
    whether they have changed.

    `layers[l]` is how layer l was called; `attn_out[l]` is what its attention added to the residual stream `[1, T, d]`
    (None where no part of the layer does); `end` is what enters the tail, the final norm; `final` is what leaves it.
    `stock_final` is the untouched model's own, and `stock_logits` `[V]` are its logits at the last position;
    `bit_identical` says whether the model gave the same, in every bit, inside the freeze; `random` whether it gave
    something else.
    `attention_received` `[T]` is the share of attention that later tokens give to each token, the mean over layers and
    heads (zero where a model has no attention).

    `explicit[l]` says whether layer l has explicit products (see `loclin.network.explicit`) that rebuild its value, and
    `coefficients[l]` is what they need, where it is kept; `biased[l]` is False where they have no biases. `causal` is
    True where no token attends to a later one.

    Where blocks do not hand the hidden state straight to one another, `route.whole` says why, and the network from the
    embeddings to `final` is one single layer.
    """

    model: Model
    weights: Snapshot
    anatomy: Anatomy
    route: Route
    hold: Hold
    input_ids: Int[Tensor, "1 T"]
    layers: list[Call]
    attn_out: list[Tensor | None]
    end: Call
    final: Float[Tensor, "1 T d_final"]
    stock_final: Float[Tensor, "1 T d_final"]
    stock_logits: Float[Tensor, " V"]
    bit_identical: bool
    random: bool
    attention_received: Float[Tensor, " T"]
    misuses: tuple[Misuse, ...]
    explicit: tuple[bool, ...]
    coefficients: tuple[Coefficients | None, ...]
    biased: tuple[bool, ...]
    causal: bool
    _heads: dict[int, Head] = field(default_factory=dict)

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

    def entered(self, index: int) -> Float[Tensor, "1 T d"]:
        """What enters a layer, as the model has it; what leaves the last, for the index behind it."""
        return self.layers[index].hidden if index < self.n_layers else self.end.hidden

    def check_weights(self, module: nn.Module) -> None:
        """Refuse to compute with a part of the model whose weights are not those that were traced.

        Raises
        ------
        ModelError
            Naming the weights.
        """
        self.weights.check(module, self.model.info.name)

    def position(self, position: int) -> int:
        """A position counted from the front.

        Raises
        ------
        PromptError
            When it lies outside the prompt.
        """
        position = whole("position", position)
        if not -self.length <= position < self.length:
            raise PromptError(
                f"position {position} is outside the prompt, which has {self.length} tokens "
                f"(0 to {self.length - 1}, or -{self.length} to -1)"
            )
        return position % self.length

    def part(self, layer: int, kind: str) -> str:
        """The path, from a layer, of the module that gives `attn_out` or `mlp_out`.

        Raises
        ------
        OptionError
            When no module of the layer does.
        """
        parts = self.layers[layer].block.parts
        path = parts.mlp if kind == "mlp_out" else parts.attn
        if path is None:
            raise OptionError(
                f"no module of layer {layer} ({type(self.layers[layer].block.module).__name__}) gives {kind} alone; "
                "use resid_pre and resid_post"
            )
        return path

    def stream(self, node: int) -> Float[Tensor, "1 T d"]:
        """The residual stream's value at a node (see `Point.node`), before the final norm."""
        layer, mid = divmod(node, 2)
        if layer == self.n_layers:
            return self.end.value
        value = self.layers[layer].value
        return value + self._attended(layer).to(value.device) if mid else value

    def _attended(self, layer: int) -> Float[Tensor, "1 T d"]:
        added = self.attn_out[layer]
        if added is None:
            self.part(layer, "attn_out")
        assert added is not None
        return added

    def value(self, point: Point) -> Float[Tensor, "T n"]:
        """The frozen network's value at a point, at every position: `[T, d]`, or `[T, V]` for the logits."""
        if point.kind == "logits":
            return torch.stack([self.logits(position) for position in range(self.length)])
        if point.kind == "final":
            return self.final[0]
        if point.layer is not None and point.kind == "attn_out":
            return self._attended(point.layer)[0]
        node = point.node(self.n_layers)
        if point.layer is not None and point.kind == "mlp_out":
            self.part(point.layer, "mlp_out")
            after = self.stream(node)
            return (after - self.stream(node - 1).to(after.device))[0]
        return self.stream(node)[0]

    def logits(self, position: int) -> Float[Tensor, " V"]:
        """The frozen network's logits at one position; soft caps and scales, where the model has them, included."""
        return self.head(position).value

    def head(self, position: int) -> Head:
        """The way from `final` to the logits at one position. Cost: a forward pass, once for each position."""
        if position not in self._heads:
            self.check_weights(self.model.hf)
            with torch.no_grad(), frozen(self.model.hf, self.hold, self.dtype) as mode:
                self._heads[position], *_ = _leave(mode, self.model, self.input_ids, self.route, position, self.final)
        return self._heads[position]


def agrees(again: Tensor, before: Tensor, widened: bool = False) -> bool:
    """Whether a part of the model, run again, gives what it gave before, up to rounding: threads sum in any order.

    `widened`: one of the two was without the casts to float32 that are in a model's code.
    """
    if torch.equal(again, before):
        return True
    finite, scale = before.isfinite(), torch.finfo(before.dtype)
    if not torch.equal(again.isfinite(), finite):
        return False
    again, before = (value.masked_fill(~finite, 0) for value in (again, before))  # tokens may be ruled out by -inf
    return relative(again - before, before) <= _ROUNDINGS * max(scale.eps, _SINGLE if widened else 0.0)


class _NotAChain(Exception):
    """The blocks take more than the hidden state; says why."""


@in_plain_torch
def trace(model: Model, input_ids: Int[Tensor, "1 T"], hold: Hold, keep: int = 0) -> Trace:
    """Run the model twice, stock and frozen, and remember the frozen pass.

    Cost: two forward passes, and a third where blocks have to be taken as one. Memory: 2 L T d numbers and the masks,
    L T d more where the linear path has another dtype, and up to `keep` bytes of coefficients: L T (4 d + 2 f + H T)
    numbers are all of them. While it runs, one layer's activations twice, and about four times `[H, T, T]`.

    Raises
    ------
    ModelError
        When the way from the embeddings to the logits cannot be followed.
    """
    own, before = model.hf, Snapshot(model.hf)
    model = model.replicate()
    _refuse_hooks(model)
    parts = anatomy(model.hf)
    input_ids = input_ids.to(model.device, copy=True)  # a copy: the caller's may be changed, or of inference mode
    with torch.no_grad():
        with eager_code():
            route = find_route(model, parts, input_ids)
        changed = before.changed_itself(own)
        if changed:
            raise ModelError(
                f"{model.info.name}: its weights changed while it ran ({changed[0]}): another thread trains it, or its "
                "own forward pass changes them. Linearize a model that stays as it is",
                changed[0],
            )
        weights = Snapshot(model.hf)
        try:
            found = _record(model, weights, parts, route, input_ids, hold, keep)
        except _NotAChain as why:
            found = _record(model, weights, parts, as_whole(route, model, parts, str(why)), input_ids, hold, keep)
    found.check_weights(model.hf)
    return found


def _refuse_hooks(model: Model) -> None:
    """Refuse a model with hooks on it that say of themselves why they cannot be part of a map."""
    for module in model.hf.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            why = getattr(getattr(hook, "__self__", None), "why_not_linearized", None)
            if why is not None:
                raise ModelError(f"{model.info.name} {why}")


def _record(
    model: Model, weights: Snapshot, parts: Anatomy, route: Route, input_ids: Tensor, hold: Hold, keep: int
) -> Trace:
    dtype = hold.dtype(route.dtype)
    keeps = hold.keeps_stock(route.dtype)
    calls: list[Call] = []
    attn_out: list[Tensor | None] = []
    last: dict[str, Tensor] = {}
    ahead: list[Tensor] = []

    def attention(probs: Tensor) -> Tensor:
        last["probs"] = probs
        ahead.append(probs.triu(1).any().cpu())
        return _received(probs)

    with frozen(model.hf, hold, dtype, keep=attention) as mode, ExitStack() as stack:
        layers = _Explicit(mode, route, parts, keep)

        def value(tensor: Tensor) -> Tensor:
            with mode.paused():  # what is remembered has no twin of its own
                return (tensor if keeps else mode.live(tensor)).detach().to(dtype)

        def remembered(hidden: Tensor) -> tuple[Tensor, Tensor]:
            with mode.paused():
                stock = hidden.detach().clone()
            return stock, stock if keeps and stock.dtype == dtype else value(hidden).clone()

        def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_state(args, kwargs)
            rest = {name: item for name, item in kwargs.items() if name != "hidden_states"}
            if not calls:
                mode.enter(hidden)
            block = route.blocks[len(calls)]
            if mode.depends((*args[1:], *rest.values())):
                raise _NotAChain(f"{block.name} takes more from the embeddings than its hidden state")
            calls.append(Call(block, *remembered(hidden), args[1:], rest))
            attn_out.append(None)
            last["entered"] = mode.live(hidden).detach()

        def left(_module: nn.Module, _args: Any, output: Any) -> None:
            last["hidden"], last["value"] = first(output).detach(), value(first(output))
            if route.whole is None:
                layers.read(len(calls) - 1, last["entered"], mode.live(first(output)), last.pop("probs", None))

        def attended(_module: nn.Module, _args: Any, output: Any) -> None:
            attn_out[-1] = value(first(output))

        def embedded(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if not calls:
                mode.enter(output)
                calls.append(Call(Block(model.hf, "model", Parts()), *remembered(output)))
                attn_out.append(None)

        for module in model.hf.modules():
            stack.callback(mode.watch(module).remove)
        if route.whole is not None:
            stack.callback(model.hf.get_input_embeddings().register_forward_hook(embedded).remove)
        for handle in layers.hooks():
            stack.callback(handle.remove)
        for module in dict.fromkeys(block.module for block in route.blocks):
            stack.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(left).remove)
        for part in dict.fromkeys(b.module.get_submodule(b.parts.attn) for b in route.blocks if b.parts.attn):
            stack.callback(part.register_forward_hook(attended).remove)
        head, final, stock_final = _leave(mode, model, input_ids, route, input_ids.shape[1] - 1, None)
    if not calls or (route.whole is not None and calls[0].hidden.shape != final.shape):
        raise ModelError(
            f"{model.info.name}: the way from the embeddings to {type(route.exit).__name__} cannot be followed: one is "
            f"{list(calls[0].hidden.shape) if calls else 'not used'}, the other {list(final.shape)}",
            type(route.exit).__name__,
        )
    end = Block(nn.Sequential(*route.tail), "final_norm", Parts())
    repeated = ((stock_final, route.final), (head.stock, route.logits))
    received = [share.cpu() for share in mode.probabilities.values() if share.shape == (input_ids.shape[1],)]
    return Trace(
        model=model,
        weights=weights,
        anatomy=parts,
        route=route,
        hold=hold,
        input_ids=input_ids,
        layers=calls,
        attn_out=attn_out,
        end=Call(end, last["hidden"], last["value"]) if route.whole is None else Call(end, stock_final, final),
        final=final,
        stock_final=route.final,
        stock_logits=route.logits,
        bit_identical=all(torch.equal(again, before) for again, before in repeated),
        random=not all(agrees(again, before, hold.precision == "double") for again, before in repeated),
        attention_received=torch.stack(received).mean(0) if received else torch.zeros(input_ids.shape[1]),
        misuses=tuple(mode.misuses),
        explicit=tuple(layers.exact),
        coefficients=tuple(layers.kept),
        biased=tuple(layers.biased),
        causal=not any(ahead),
        _heads={input_ids.shape[1] - 1: head},
    )


class _Explicit:
    """Which layers of a frozen pass have explicit products, and their coefficients as far as they are kept."""

    def __init__(self, mode: Frozen, route: Route, parts: Anatomy, keep: int) -> None:
        self._mode, self._room = mode, keep
        self._weights = None if mode.hold.ordinary or route.whole is not None else parts.weights
        self._readers: list[Reader | None] = [self._reader(block.module) for block in route.blocks]
        self._workspace = Workspace()
        n = max(1, len(route.blocks))
        self.exact, self.biased = [False] * n, [True] * n
        self.kept: list[Coefficients | None] = [None] * n

    def _reader(self, layer: nn.Module) -> Reader | None:
        if self._weights is None or not explicit.available(layer, self._weights, self._mode.dtype):
            return None
        return Reader(self._mode, layer, self._weights)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every layer's parts."""
        for reader in self._readers:
            if reader is not None:
                yield from reader.hooks()

    def read(self, index: int, x: Tensor, y: Tensor, probs: Tensor | None) -> None:
        """Take a layer's coefficients after it ran from x to y `[1, T, d]`, if they rebuild y."""
        reader = self._readers[index]
        held = None if reader is None or probs is None else reader.found(probs)
        if reader is not None:
            reader.forget()
        if held is None or reader is None or self._weights is None:
            return
        layer = explicit.ExplicitLayer(reader.layer, self._weights, held, self._mode.dtype, self._workspace)
        error = relative(layer.value(x[0]).to(y.device) - y[0], y)
        self.exact[index] = error <= explicit.AGREEMENT[self._mode.dtype]
        self.biased[index] = layer.biased or not self.exact[index]
        if self.exact[index] and held.nbytes <= self._room:
            self._room -= held.nbytes
            self.kept[index] = held


def _leave(
    mode: Frozen, model: Model, input_ids: Tensor, route: Route, position: int, final: Tensor | None
) -> tuple[Head, Tensor, Tensor]:
    """Run the model, and build the graph from its final hidden state at one position on.

    Also gives that state at all positions: the frozen network's own (or `final`, where it is known already), and the
    model's.
    """
    seen: dict[str, Tensor] = {}
    keeps = mode.hold.keeps_stock(route.dtype)
    mode.graph = False

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        stock = first(output)
        if final is None and mode.status(stock) is None:
            return  # a norm that the embeddings pass too
        value = final
        if value is None:
            live = mode.live(stock)  # also where it is not the value: it notes what is not live
            value = (stock.detach() if keeps else live).to(mode.dtype)
        leaf = value[0, position].clone().requires_grad_()
        mode.graph = mode.collect = mode.caps = True
        mode.constants.clear()
        with mode.paused():
            mode.enter(stock, torch.cat([value[:, :position], leaf[None, None], value[:, position + 1 :]], dim=1))
        seen.update(stock=stock.detach(), final=value, leaf=leaf)

    handle = route.exit.register_forward_hook(left)
    try:
        logits = logits_at(model, input_ids, position)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(
            f"{model.info.name}: {type(route.exit).__name__} does not depend on the embeddings by any operation that "
            "loclin sees; load the model with attn_implementation='eager' and without compiled code or kernels"
        )
    live = mode.live(logits)
    value = logits.to(mode.dtype) if keeps else live.detach()
    return Head(seen["leaf"], live, logits, value, mode.constants), seen["final"], seen["stock"]


def _received(probs: Tensor) -> Tensor:
    """The mean attention `[T]` that the queries behind each token give to it; 0 for the last, which has none."""
    behind = torch.arange(probs.shape[-1] - 1, -1, -1, device=probs.device).clamp_min(1)
    return (probs.float().tril(-1).sum(-2) / behind).mean((0, 1))
