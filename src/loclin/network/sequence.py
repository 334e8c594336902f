"""What one forward pass shows, in any family: the order of the blocks, their sublayers, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.models.forward import at_all_tokens, hidden_input, hidden_output, hooked, logits_at
from loclin.models.model import Model
from loclin.network.anatomy import Anatomy
from loclin.network.autograd import grad

_SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MLP_WORDS = ("mlp", "ffn", "ff", "feed", "moe", "expert", "fc")


@dataclass(frozen=True)
class Sublayers:
    """Paths, from a block, of the modules whose outputs are added to the residual stream; None where there is none.

    Where a norm or a scale follows the attention or the MLP, it is the path of that norm.
    """

    attn: str | None = None
    mlp: str | None = None


known_sublayers: ContextVar[Sublayers | None] = ContextVar("known_sublayers", default=None)
"""Every block's, where tensors have no numbers by which to find them (`loclin.common.rehearsal`)."""


@dataclass(frozen=True)
class Block:
    """One call of a decoder block."""

    module: nn.Module
    name: str
    sublayers: Sublayers

    __repr__ = brief


@dataclass
class BlockSequence:
    """What an ordinary forward pass showed."""

    blocks: list[Block]  # the decoder blocks, in the order of their calls
    tail: list[nn.Module]  # behind the last block, each taking the output of the one before: the final norm, as a rule
    final: Tensor  # the tail's output [1, T, d]: the final hidden state
    predicts: int  # the position of the model's prediction: the last token, the mask, or the one that the classes read
    logits: Tensor  # the model's own there [V]
    fallback_reason: str | None  # why the network is taken as one block, if blocks do not pass the hidden state on
    exit: nn.Module  # whose output `final` is
    decoded: Tensor | None  # the decoder's output, where it is one vector per token
    dtype: torch.dtype  # that the model rounds to: the coarsest of its weights and its final hidden state

    __repr__ = brief


def find_sequence(model: Model, anatomy: Anatomy, input_ids: Tensor) -> BlockSequence:
    """Watch one ordinary forward pass. Cost: the pass.

    ModelError where not even the decoder's output can be found, or the model's own values are not finite.
    """
    watcher = _Watcher(model, anatomy, input_ids.shape[1] - model.encoder_length)
    at = _predicted_position(model, input_ids)
    with torch.no_grad(), hooked(watcher.hooks()):
        try:
            logits = logits_at(model, input_ids, at)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as fault:
            what = str(fault).partition("\n")[0]
            raise ModelError(f"{model.info.name}: the model's own forward pass fails: {what}", "forward") from fault
    final = watcher.current if isinstance(watcher.current, Tensor) else logits
    dtype = _coarsest_dtype(model, logits, final)
    _refuse_overflow(model, watcher, logits, dtype)
    blocks, tail = watcher.blocks, watcher.tail
    reason = "its decoder reads its encoder" if model.encoder_length else watcher.fallback_reason()
    leaves = tail[-1] if tail else (blocks[-1].module if blocks else anatomy.decoder)
    found = BlockSequence(blocks, tail, final, at, logits, reason, leaves, watcher.decoded, dtype)
    found = found if reason is None else as_one_block(found, model, anatomy, input_ids.shape[1], reason)
    return _at_classes(found, model, input_ids) if model.task == "classification" else found


def _predicted_position(model: Model, input_ids: Tensor) -> int:
    """The first masked token of a model that fills masks; otherwise, or without a mask, the last token."""
    ids = input_ids[0].tolist()
    return ids.index(model.mask) if model.task == "masked" and model.mask in ids else len(ids) - 1


def _at_classes(sequence: BlockSequence, model: Model, input_ids: Tensor) -> BlockSequence:
    """The sequence at the token whose final hidden state the classes read. Cost: a forward pass.

    ModelError where they read several.
    """
    seen: list[Tensor] = []

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        torch.set_grad_enabled(True)  # from here on: restored below
        hidden = hidden_output(output)
        seen.append(hidden if hidden.requires_grad else hidden.requires_grad_())

    with torch.no_grad(), hooked([sequence.exit.register_forward_hook(leave)]):
        logits = logits_at(model, input_ids, sequence.predicts)
        # NaN reaches whatever is read, also where derivatives vanish
        cotangent = torch.full_like(logits, torch.nan)
        found = logits.requires_grad and grad(logits, seen[-1], cotangent, allow_unused=True)[0]
    moved = found if isinstance(found, Tensor) else torch.zeros_like(seen[-1])
    read = at_all_tokens(model, moved, input_ids.shape[1])[0].isnan().any(-1).nonzero().flatten().tolist()
    if len(read) != 1:
        kind, count = type(sequence.exit).__name__, len(read)
        what = f"the final hidden states of {count} tokens" if read else f"none of the hidden states that {kind} gives"
        raise ModelError(
            f"{model.info.name}: its classes read {what}; loclin takes classifiers that read that of one token, such "
            "as [CLS] or the last",
            kind,
        )
    return replace(sequence, predicts=int(read[0]))


def as_one_block(sequence: BlockSequence, model: Model, anatomy: Anatomy, length: int, reason: str) -> BlockSequence:
    """Everything from the embeddings to the decoder's output as one block; ModelError if it is no vector a token."""
    if sequence.decoded is None:
        kind = type(anatomy.decoder).__name__
        raise ModelError(
            f"{model.info.name}: loclin cannot follow the hidden state through {kind}, because {reason}, and its "
            "output is not one vector per token",
            kind,
        )
    final = at_all_tokens(model, sequence.decoded, length)
    return replace(
        sequence, blocks=[], tail=[], final=final, fallback_reason=reason, exit=anatomy.decoder, decoded=None
    )


def _coarsest_dtype(model: Model, *values: Tensor) -> torch.dtype:
    """The coarsest dtype of the weights and some values (a stream may be float32); nothing is computed in 8 bits."""
    dtypes = {tensor.dtype for tensor in (*model.hf.parameters(), *values) if tensor.is_floating_point()}
    return max((dtype for dtype in dtypes if dtype.itemsize > 1), key=lambda dtype: torch.finfo(dtype).eps)


def _refuse_overflow(model: Model, watcher: _Watcher, logits: Tensor, dtype: torch.dtype) -> None:
    """Refuse values that are not finite, and say where they begin; logits of -inf are allowed: they rule tokens out."""
    if watcher.overflowed is None and not (logits.isnan() | logits.isposinf()).any():
        return
    place, module = watcher.overflowed or ("behind the last layer", model.hf)
    path = next(path for path, known in model.hf.named_modules() if known is module)
    kind = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        fault = f"overflows {kind} {place} (its first value that is not finite); use dtype bfloat16 or float32"
    else:
        fault = f"is not finite in {kind}, first {place}, by its own forward pass; use a wider dtype, or other weights"
    raise ModelError(f"{model.info.name} {fault}", path)


class _Watcher:
    """Hooks that follow the hidden state; `blocks`, `tail` and `decoded` as in `BlockSequence`."""

    def __init__(self, model: Model, anatomy: Anatomy, length: int) -> None:
        self._model, self._anatomy, self._length = model, anatomy, length
        self._names = {module: name for name, module in model.hf.named_modules()}
        self._interruption: str | None = None
        self._block_input: Tensor = torch.empty(0)
        self._outputs: dict[str, Tensor] = {}
        self._running_tail: nn.Module | None = None
        self.blocks: list[Block] = []
        self.tail: list[nn.Module] = []
        self.current: Any = None  # what left the last block, or the last module of the tail
        self.decoded: Tensor | None = None
        self.overflowed: tuple[str, nn.Module] | None = None  # where the first value is that is not finite, in words

    def fallback_reason(self) -> str | None:
        """Why the blocks do not pass the hidden state straight to one another; None where they do."""
        if self._interruption or not self.blocks:
            return self._interruption or "it has no list of blocks"
        if not self._is_stream(self.current):
            return "what leaves its blocks is not one vector per token"
        return None

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the decoder, its blocks, their sublayers, and every module outside the blocks."""
        anatomy = self._anatomy
        inner = {module for layer in anatomy.layers for module in layer.modules()}
        yield anatomy.decoder.register_forward_hook(self._leave_decoder)
        for layer in anatomy.layers:
            yield layer.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            yield layer.register_forward_hook(self._leave_block)
            for path, part in layer.named_modules():
                if path and path.count(".") < 2:
                    yield part.register_forward_hook(self._leave_sublayer(path))
        for module in self._model.hf.modules():
            if module not in inner and anatomy.head not in module.modules():
                yield module.register_forward_pre_hook(self._enter_tail, with_kwargs=True)
                yield module.register_forward_hook(self._leave_tail)

    def _is_stream(self, hidden: Any) -> bool:
        """Whether something is one vector per token, `[1, T, d]`."""
        return isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == (1, self._length)

    def _note_overflow(self, values: Any, place: str, module: nn.Module) -> None:
        """Remember where the first values are that are not finite."""
        if self.overflowed is None and isinstance(values, Tensor) and not values.isfinite().all():
            self.overflowed = place, module

    def _enter_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_input(args, kwargs)
        if not self.blocks:
            self._note_overflow(hidden, "in the embeddings", self._model.hf.get_input_embeddings())
        if not self._is_stream(hidden):
            self._interruption = f"{self._names[module]} does not take one vector per token"
        elif self.blocks and not (hidden.shape == self.current.shape and torch.equal(hidden, self.current)):
            self._interruption = f"what enters {self._names[module]} is not what left the block before it"
        else:
            self._block_input = hidden
        self._outputs, self.tail, self._running_tail = {}, [], None

    def _leave_sublayer(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            out = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
            if isinstance(out, Tensor) and out.shape == self._block_input.shape:
                # a copy: it may be added to in place
                self._outputs.setdefault(path, out[0, -1].to(torch.float64, copy=True))

        return hook

    def _leave_block(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.current = hidden_output(output)
        self._note_overflow(self.current, f"in layer {len(self.blocks)}", module)
        found = Sublayers()
        if self._interruption is None and self._is_stream(self.current):
            added = self.current[0, -1].double() - self._block_input[0, -1].double()
            limit = _SUM_TOLERANCE.get(self.current.dtype, 1e-1)
            found = known_sublayers.get() or _find_addends(self._outputs, added, limit)
        self.blocks.append(Block(module, self._names[module], found))

    def _enter_tail(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        only_input = not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
        if self.blocks and self._running_tail is None and args and args[0] is self.current and only_input:
            self._running_tail = module

    def _leave_tail(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._running_tail is module:
            self._running_tail = None
            if self._is_stream(output):
                self.tail.append(module)
                self.current = output

    def _leave_decoder(self, module: nn.Module, _args: Any, output: Any) -> None:
        out = hidden_output(output)
        self._note_overflow(out, "behind the last layer", module)
        out = out[:, : self._length] if isinstance(out, Tensor) and out.dim() == 3 else out
        self.decoded = out if self._is_stream(out) else None


def _find_addends(outputs: dict[str, Tensor], added: Tensor, tolerance: float) -> Sublayers:
    """Which one or two modules' outputs sum to what a block adds; the outermost where several give the same."""
    paths = sorted(outputs, key=lambda path: (path.count("."), "drop" in path))
    order = {path: index for index, path in enumerate(outputs)}
    limit = tolerance * added.norm()
    for one in paths:
        if (outputs[one] - added).norm() <= limit:
            return Sublayers(mlp=one) if _looks_like_mlp(one) else Sublayers(attn=one)
    for pair in combinations(paths, 2):
        if (outputs[pair[0]] + outputs[pair[1]] - added).norm() <= limit:
            attn, mlp = sorted(pair, key=lambda path: (_looks_like_mlp(path), order[path]))
            return Sublayers(attn, mlp)
    return Sublayers()


def _looks_like_mlp(path: str) -> bool:
    return any(word in path.lower() for word in _MLP_WORDS)
