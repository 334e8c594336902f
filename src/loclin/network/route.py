"""The way the hidden state takes through a model: which blocks it passes, and what follows them. Found by watching.

Nothing here knows families. One ordinary forward pass shows which of the decoder's blocks are called and in what order,
what each block's parts add to the residual stream, and which modules (the final norm) come behind the last block.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.models.model import Model
from loclin.network.anatomy import Anatomy

_SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MLP_WORDS = ("mlp", "ffn", "ff", "feed", "moe", "expert", "fc")


@dataclass(frozen=True)
class Parts:
    """Paths, from a block, of the modules whose outputs are added to the residual stream; None where there is none.

    Where a norm or a scale follows the attention or the MLP, it is that norm: what is added is what counts.
    """

    attn: str | None = None
    mlp: str | None = None


@dataclass(frozen=True)
class Block:
    """One call of a decoder block."""

    module: nn.Module
    name: str
    parts: Parts

    __repr__ = brief


@dataclass
class Route:
    """What a stock forward pass showed.

    Attributes
    ----------
    blocks
        The decoder blocks, in the order of their calls.
    tail
        The modules behind the last block, each taking what the one before gives: the final norm, as a rule.
    final
        What the tail gives `[1, T, d]`: the final hidden state.
    logits
        The model's logits at the last position `[V]`.
    whole
        None, or why the blocks do not form a chain.
    exit
        The module whose output `final` is.
    decoded
        The decoder's output, where it is one vector per token: `final` once the blocks are taken as one.
    dtype
        The dtype that the model rounds to: the coarsest of its weights' and its final hidden state's.
    """

    blocks: list[Block] = field(default_factory=list)
    tail: list[nn.Module] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    whole: str | None = None
    exit: nn.Module = field(default_factory=nn.Identity)
    decoded: Tensor | None = None
    dtype: torch.dtype = torch.float32

    __repr__ = brief


def first(output: Any) -> Any:
    """A module's hidden-state output: some return it alone, some in front of other things."""
    return output if isinstance(output, Tensor) else output[0]


def hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block's input: its first argument."""
    return args[0] if args else kwargs.get("hidden_states")


def logits_at(model: Model, input_ids: Tensor, position: int) -> Tensor:
    """The model's logits `[V]` at one position: one forward pass, and one row of the head where the model can."""
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        keep = torch.tensor([position], device=input_ids.device)
        return model.hf(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits[0, 0]
    return model.hf(input_ids=input_ids, use_cache=False).logits[0, position]


def find_route(model: Model, parts: Anatomy, input_ids: Tensor) -> Route:
    """Watch one stock forward pass. Cost: the pass.

    Raises
    ------
    ModelError
        When not even the decoder's output can be found; when the model's own values are not finite.
    """
    watch = _Watch(model, parts, input_ids.shape[1])
    with torch.no_grad(), watch.hooks():
        try:
            logits = logits_at(model, input_ids, input_ids.shape[1] - 1)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as fault:
            what = str(fault).partition("\n")[0]
            raise ModelError(f"{model.info.name}: the model's own forward pass fails: {what}", "forward") from fault
    final = watch.current if isinstance(watch.current, Tensor) else logits
    dtype = _coarsest(model, logits, final)
    _refuse_overflow(model, watch, logits, dtype)
    route = Route(watch.blocks, watch.tail, final, logits, watch.why_not(), decoded=watch.decoded, dtype=dtype)
    route.exit = route.tail[-1] if route.tail else (watch.blocks[-1].module if watch.blocks else parts.decoder)
    return route if route.whole is None else as_whole(route, model, parts, route.whole)


def _coarsest(model: Model, *values: Tensor) -> torch.dtype:
    """The dtype with the coarsest rounding among the weights and some values.

    A half-precision model may keep its residual stream in float32. In stored formats of 8 bits nothing is computed.
    """
    dtypes = {tensor.dtype for tensor in (*model.hf.parameters(), *values) if tensor.is_floating_point()}
    return max((dtype for dtype in dtypes if dtype.itemsize > 1), key=lambda dtype: torch.finfo(dtype).eps)


def _refuse_overflow(model: Model, watch: _Watch, logits: Tensor, dtype: torch.dtype) -> None:
    """Say where the model's own values stop being numbers: no coefficient can be made of what follows.

    A logit of minus infinity is how some models rule a token out.
    """
    if watch.overflowed is None and not (logits.isnan() | logits.isposinf()).any():
        return
    place, module = watch.overflowed or ("behind the last layer", model.hf)
    path = next(path for path, known in model.hf.named_modules() if known is module)
    kind = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        fault = f"overflows {kind} {place} (its first value that is not finite); use dtype bfloat16 or float32"
    else:
        fault = f"is not finite in {kind}, first {place}, by its own forward pass; use a wider dtype, or other weights"
    raise ModelError(f"{model.info.name} {fault}", path)


def as_whole(route: Route, model: Model, parts: Anatomy, why: str) -> Route:
    """The same route with everything from the embeddings to the decoder's output as one block.

    Raises
    ------
    ModelError
        When the decoder's output is not one vector per token.
    """
    if route.decoded is None:
        raise ModelError(
            f"{model.info.name}: loclin cannot follow the hidden state through {type(parts.decoder).__name__}: {why}",
            type(parts.decoder).__name__,
        )
    return Route([], [], route.decoded, route.logits, why, parts.decoder, dtype=route.dtype)


class _Watch:
    """Hooks that follow the hidden state."""

    def __init__(self, model: Model, parts: Anatomy, length: int) -> None:
        self._model, self._parts, self._length = model, parts, length
        self._names = {module: name for name, module in model.hf.named_modules()}
        self._broken: str | None = None
        self._entered: Tensor = torch.empty(0)
        self._given: dict[str, Tensor] = {}
        self._inside: nn.Module | None = None
        self.blocks: list[Block] = []
        self.tail: list[nn.Module] = []
        self.current: Any = None
        self.decoded: Tensor | None = None
        self.overflowed: tuple[str, nn.Module] | None = None

    def _check(self, values: Any, place: str, module: nn.Module) -> None:
        """Note where the first values are that are not finite."""
        if self.overflowed is None and isinstance(values, Tensor) and not values.isfinite().all():
            self.overflowed = place, module

    def why_not(self) -> str | None:
        """Why the blocks do not form a chain; None where they do."""
        if self._broken or not self.blocks:
            return self._broken or "it has no list of blocks"
        if not self._is_stream(self.current):
            return "what leaves its blocks is not one vector per token"
        return None

    def _is_stream(self, hidden: Any) -> bool:
        return isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == (1, self._length)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Put the hooks on, and take them off again."""
        hf, layers = self._model.hf, self._parts.layers
        inner = {module for layer in layers for module in layer.modules()}
        handles: list[RemovableHandle] = [self._parts.decoder.register_forward_hook(self._decoder_left)]
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(self._block_entered, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._block_left))
            for path, part in layer.named_modules():
                if path and path.count(".") < 2:
                    handles.append(part.register_forward_hook(self._part_left(path)))
        for module in hf.modules():
            if module not in inner and module is not self._parts.head:
                handles.append(module.register_forward_pre_hook(self._tail_entered, with_kwargs=True))
                handles.append(module.register_forward_hook(self._tail_left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _block_entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_state(args, kwargs)
        if not self.blocks:
            self._check(hidden, "in the embeddings", self._model.hf.get_input_embeddings())
        if not self._is_stream(hidden):
            self._broken = f"{self._names[module]} does not take one vector per token"
        elif self.blocks and not (hidden.shape == self.current.shape and torch.equal(hidden, self.current)):
            self._broken = f"what enters {self._names[module]} is not what left the block before it"
        else:
            self._entered = hidden
        self._given, self.tail, self._inside = {}, [], None

    def _part_left(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            out = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
            if isinstance(out, Tensor) and out.shape == self._entered.shape:
                self._given.setdefault(path, out[0, -1].to(torch.float64, copy=True))  # it may be added to in place

        return hook

    def _block_left(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.current = first(output)
        self._check(self.current, f"in layer {len(self.blocks)}", module)
        found = Parts()
        if self._broken is None and self._is_stream(self.current):
            added = self.current[0, -1].double() - self._entered[0, -1].double()
            found = _addends(self._given, added, _SUM_TOLERANCE.get(self.current.dtype, 1e-1))
        self.blocks.append(Block(module, self._names[module], found))

    def _tail_entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
        if self.blocks and self._inside is None and args and args[0] is self.current and alone:
            self._inside = module

    def _tail_left(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._inside is module:
            self._inside = None
            if self._is_stream(output):
                self.tail.append(module)
                self.current = output

    def _decoder_left(self, module: nn.Module, _args: Any, output: Any) -> None:
        out = first(output)
        self._check(out, "behind the last layer", module)
        self.decoded = out if self._is_stream(out) else None


def _addends(given: dict[str, Tensor], added: Tensor, tolerance: float) -> Parts:
    """Which one or two parts sum to what a block adds; the outermost where several give the same."""
    paths = sorted(given, key=lambda path: (path.count("."), "drop" in path))
    order = {path: index for index, path in enumerate(given)}
    limit = tolerance * added.norm()
    for one in paths:
        if (given[one] - added).norm() <= limit:
            return Parts(mlp=one) if _looks_like_mlp(one) else Parts(attn=one)
    for pair in combinations(paths, 2):
        if (given[pair[0]] + given[pair[1]] - added).norm() <= limit:
            attn, mlp = sorted(pair, key=lambda path: (_looks_like_mlp(path), order[path]))
            return Parts(attn, mlp)
    return Parts()


def _looks_like_mlp(path: str) -> bool:
    return any(word in path.lower() for word in _MLP_WORDS)
