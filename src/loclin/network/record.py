"""Trace a prompt: run the model once as it is, and once frozen, and remember the frozen pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.sums import relative_error
from loclin.common.surroundings import eager_code, in_plain_torch
from loclin.errors import ModelError
from loclin.freeze import FreezeOptions, Frozen, frozen
from loclin.freeze.pattern import BlockPattern, Pattern, PatternBlock
from loclin.models.forward import Rows, hidden_input, hidden_output, hook_embeddings, hooked
from loclin.models.model import Model
from loclin.models.snapshot import Snapshot
from loclin.network.anatomy import Anatomy, find_anatomy
from loclin.network.autograd import depends_on
from loclin.network.ends import OutputHeadLink
from loclin.network.proof import proved_positions
from loclin.network.reader import ExplicitLayers
from loclin.network.sequence import Block, BlockSequence, Sublayers, as_one_block, find_sequence
from loclin.network.trace import BlockCall, Trace, agrees, run_to_logits, takes_values

_HEAD_ERROR = 1e-3  # of logits that are rebuilt from a final hidden state: far beyond rounding


class _NotASequenceError(Exception):
    """The blocks take more from the embeddings than the hidden state, or others follow them; says which."""


@in_plain_torch
def trace_prompt(
    model: Model,
    input_ids: Int[Tensor, "1 T"],
    options: FreezeOptions,
    keep: int = 0,
    attention_bytes: int | None = None,
) -> Trace:
    """Run the model twice, as it is and frozen, and remember the frozen pass.

    Cost: two forward passes, and a third where blocks have to be taken as one; one column of explicit products, of a
    prompt of more than 1 024 tokens at 512 of them (see `loclin.network.proof`). Memory: 2 L T d numbers and the masks,
    L T d more where the linear path has another dtype, and up to `keep` bytes of coefficients: L T (4 d + 2 f + H T)
    numbers are all of them, or L T (4 d + 2 f + H d_head) without whole attention probabilities. While it runs, one
    layer's activations twice, and about four times `[H, T, T]`, or `attention_bytes` where that is less.

    ModelError where nothing connects the embeddings to the logits that loclin can follow, or the weights change.
    """
    own, before = model.hf, Snapshot(model.hf)
    model = model.replicate()
    _refuse_hooks(model)
    anatomy = find_anatomy(model.hf)
    input_ids = input_ids.to(model.device, copy=True)  # a copy: the caller's may be changed, or of inference mode
    with torch.no_grad():
        with eager_code():
            sequence = find_sequence(model, anatomy, input_ids)
        changed = before.changed_itself(own)
        if changed:
            raise ModelError(
                f"{model.info.name}: its weights changed while it ran ({changed[0]}), by another thread that trains "
                "it, or by its own forward pass; linearize a model whose weights do not change",
                changed[0],
            )
        prompt = (model, Snapshot(model.hf), anatomy, input_ids, options, keep, attention_bytes)
        try:
            found = _record(*prompt, sequence)
        except _NotASequenceError as why:
            found = _record(*prompt, as_one_block(sequence, model, anatomy, input_ids.shape[1], str(why)))
    found.check_weights(model.hf)
    if model.task != "causal":
        _check_head(found)
    return found


def _check_head(trace: Trace) -> None:
    """Refuse, by a ModelError, logits that read more than one final hidden state: of a classifier, say."""
    head, at = OutputHeadLink(trace, trace.sequence.predicts), trace.sequence.predicts
    value = trace.logits(at)
    rebuilt = head.jvp(trace.final[:1, at])[0] + sum(head.constants().values())
    if not relative_error(rebuilt - value, value) <= _HEAD_ERROR:
        raise ModelError(
            f"{trace.model.info.name}: its logits read more than the final hidden state at position {at}, by which "
            "loclin takes them; give another model"
        )


def _refuse_hooks(model: Model) -> None:
    """Refuse a model with hooks on it that say of themselves why they cannot be part of a map."""
    for module in model.hf.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            why = getattr(getattr(hook, "__self__", None), "why_not_linearized", None)
            if why is not None:
                raise ModelError(f"{model.info.name} {why}")


class _Received:
    """How much attention each token receives in one pattern, from blocks of its queries in their order.

    The queries of a long prompt that are looked at are those at which a layer is proved, if the mask says by itself
    whether any other attends to a later token.
    """

    def __init__(self, pattern: Pattern) -> None:
        heads, queries, length = pattern.shape
        ahead, proved = pattern.looks_ahead(), proved_positions(queries)
        self._rows = proved if ahead is not None else [slice(0, queries)]
        self._in_proof = self._rows == proved
        self._total, self._asked, self._seen = torch.zeros(heads, length), torch.zeros(length), 0
        self._ahead = torch.tensor(bool(ahead))
        self._pattern: Pattern | None = pattern

    def watch(self) -> Pattern:
        """The pattern; its blocks are looked at when they are made: the product that proves a layer makes each."""
        assert self._pattern is not None
        pattern = self._pattern
        if isinstance(pattern, BlockPattern) and self._in_proof:
            return replace(pattern, see=self._see)
        self.finish()
        return pattern

    def _see(self, block: PatternBlock) -> None:
        rows, keys, probs = block
        if rows.start < self._seen:
            return
        self._seen, device = rows.stop, probs.device
        self._total, self._ahead = self._total.to(device), self._ahead.to(device)
        self._asked[rows] = 1
        diagonal = rows.start - keys.start
        earlier = min(max(0, diagonal), probs.shape[2])  # keys before all of the queries
        some, rest = probs[:, :, :earlier].float(), probs[:, :, earlier:].float()
        self._total[:, keys.start : keys.start + earlier] += some.sum(-2)
        self._total[:, keys.start + earlier : keys.stop] += rest.tril(diagonal - earlier - 1).sum(-2)
        self._ahead |= rest.triu(diagonal - earlier + 1).any()

    def finish(self) -> None:
        """Look at the blocks that have not been seen, and forget the pattern."""
        for rows in self._rows if self._pattern is not None else ():
            assert self._pattern is not None
            for block in self._pattern.blocks(slice(max(rows.start, self._seen), rows.stop)):
                self._see(block)
        self._pattern = None

    def mean(self) -> Tensor:
        """The mean attention `[T]` that later queries give to each token; 0 for the last, which has none."""
        later = self._asked.flip(0).cumsum(0).flip(0) - self._asked
        return (self._total / later.clamp_min(1).to(self._total.device)).mean(0).cpu()

    @property
    def looks_ahead(self) -> bool:
        """Whether a query attends to a later token."""
        return bool(self._ahead)


class _Attention:
    """What is remembered of the attention patterns of a pass."""

    def __init__(self) -> None:
        self.last: Pattern | None = None
        self._received: list[_Received] = []

    def keep(self, pattern: Pattern) -> _Received:
        """Remember a layer's pattern until it is taken; returns how much attention each token receives."""
        self.finish()
        received = _Received(pattern)
        self._received.append(received)
        self.last = received.watch()
        return received

    def finish(self) -> None:
        """Look at what no product has shown of the last pattern."""
        if self._received:
            self._received[-1].finish()

    def take(self) -> Pattern | None:
        """The last layer's pattern, which is forgotten."""
        pattern, self.last = self.last, None
        return pattern

    @property
    def causal(self) -> bool:
        """Whether no token attended to a later one."""
        return not any(received.looks_ahead for received in self._received)


class _Recorder:
    """Hooks that remember how each block is called, and what it gives, while a frozen pass runs."""

    def __init__(
        self,
        mode: Frozen,
        model: Model,
        input_ids: Tensor,
        sequence: BlockSequence,
        explicit: ExplicitLayers,
        attention: _Attention,
    ) -> None:
        self._mode, self._model, self._input_ids, self._sequence = mode, model, input_ids, sequence
        self._explicit, self._attention = explicit, attention
        self._keeps = mode.options.keeps_stock(sequence.dtype)
        self._entered: Tensor | None = None
        self.calls: list[BlockCall] = []
        self.attn_out: list[Tensor | None] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook the model and its parts."""
        model, sequence = self._model, self._sequence
        for module in model.hf.modules():
            yield self._mode.watch(module)
        if sequence.fallback_reason is not None:
            yield from hook_embeddings(model, self._input_ids, sequence.exit, self._leave_embeddings)
        yield from self._explicit.hooks()
        for module in dict.fromkeys(block.module for block in sequence.blocks):
            yield module.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            yield module.register_forward_hook(self._leave_block)
        attended = (b.module.get_submodule(b.sublayers.attn) for b in sequence.blocks if b.sublayers.attn)
        for module in dict.fromkeys(attended):
            yield module.register_forward_hook(self._leave_attention)

    def _value(self, tensor: Tensor) -> Tensor:
        """The frozen network's value of a tensor, out of any graph."""
        with self._mode.paused():  # what is remembered needs no linearised value of its own
            return (tensor if self._keeps else self._mode.live(tensor)).detach().to(self._mode.dtype)

    def _both_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of a hidden state in the model and in the frozen network; one copy where they are the same."""
        with self._mode.paused():
            stock = hidden.detach().clone()
        return stock, stock if self._keeps and stock.dtype == self._mode.dtype else self._value(hidden).clone()

    def _leave_embeddings(self, output: Tensor, rows: Rows, _tokens: slice) -> None:
        self._mode.enter(output)
        stock, value = (rows(both) for both in self._both_values(output))
        if self.calls:  # the tokens of a decoder, behind those of its encoder
            before = self.calls.pop()
            stock, value = torch.cat([before.hidden, stock], 1), torch.cat([before.value, value], 1)
        self.calls.append(BlockCall(Block(self._model.hf, "model", Sublayers()), stock, value))
        self.attn_out = [None]

    def _enter_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_input(args, kwargs)
        rest = {name: item for name, item in kwargs.items() if name != "hidden_states"}
        if not self.calls:
            self._mode.enter(hidden)
        block = self._sequence.blocks[len(self.calls)]
        if self._mode.depends((*args[1:], *rest.values())):
            raise _NotASequenceError(f"{block.name} takes more from the embeddings than its hidden state")
        self.calls.append(BlockCall(block, *self._both_values(hidden), args[1:], rest))
        self.attn_out.append(None)
        # a model may change its own values in place
        self._entered = self.calls[-1].value if self._mode.takes_values else self._mode.live(hidden).detach()

    def _leave_attention(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.attn_out[-1] = self._value(hidden_output(output)).clone()  # a layer may add to it in place

    def _leave_block(self, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = hidden_output(output)
        self.last = hidden.detach(), self._value(hidden)
        if self._sequence.fallback_reason is None:
            assert self._entered is not None
            y = self._mode.live(hidden)
            self._explicit.collect(len(self.calls) - 1, self._entered, y, self._attention.take())


def _record(
    model: Model,
    weights: Snapshot,
    anatomy: Anatomy,
    input_ids: Tensor,
    options: FreezeOptions,
    keep: int,
    attention_bytes: int | None,
    sequence: BlockSequence,
) -> Trace:
    dtype, length, attention = options.dtype(sequence.dtype), input_ids.shape[1], _Attention()
    with frozen(model.hf, options, dtype, keep=attention.keep, attention_bytes=attention_bytes) as mode:
        mode.takes_values = takes_values(options, sequence)
        explicit = ExplicitLayers(mode, sequence, anatomy, keep)
        mode.see_mixing = explicit.see_mixing
        recorder = _Recorder(mode, model, input_ids, sequence, explicit, attention)
        with hooked(recorder.hooks()):
            head, final, stock_final = run_to_logits(mode, model, input_ids, sequence, sequence.predicts, None)
        with mode.paused():
            reads = depends_on(head.logits, head.final)
    if not (reads or mode.nonlinear_uses):
        if sequence.fallback_reason is None:
            raise _NotASequenceError("its logits do not read what leaves its blocks")
        raise ModelError(
            f"{model.info.name}: its logits do not read what {type(sequence.exit).__name__} returns, by which loclin "
            "takes them; give another model",
            type(sequence.exit).__name__,
        )
    attention.finish()
    calls, last = recorder.calls, recorder.last
    if not calls or (sequence.fallback_reason is not None and calls[0].hidden.shape != final.shape):
        entry = f"are {list(calls[0].hidden.shape)}" if calls else "are not used"
        raise ModelError(
            f"{model.info.name}: loclin cannot follow the hidden state from the embeddings to "
            f"{type(sequence.exit).__name__}: the embeddings {entry}, and its output is {list(final.shape)}",
            type(sequence.exit).__name__,
        )
    end = Block(nn.Sequential(*sequence.tail), "final_norm", Sublayers())
    repeated = ((stock_final, sequence.final), (head.stock, sequence.logits))
    received = [found.mean() for found in mode.probabilities.values()]
    received = [share for share in received if share.shape == (length,)]
    return Trace(
        model=model,
        weights=weights,
        anatomy=anatomy,
        sequence=sequence,
        options=options,
        input_ids=input_ids,
        layers=calls,
        attn_out=recorder.attn_out,
        end=BlockCall(end, *((stock_final, final) if sequence.fallback_reason is not None or last is None else last)),
        final=final,
        stock_final=sequence.final,
        stock_logits=sequence.logits,
        bit_identical=all(torch.equal(rerun, before) for rerun, before in repeated),
        random=not all(agrees(rerun, before, options.precision == "double") for rerun, before in repeated),
        attention_received=torch.stack(received).mean(0) if received else torch.zeros(length),
        nonlinear_uses=tuple(mode.nonlinear_uses),
        explicit=tuple(explicit.exact),
        coefficients=tuple(explicit.kept),
        biased=tuple(explicit.biased),
        causal=attention.causal and not model.encoder_length,
        attention_bytes=attention_bytes,
        _heads={sequence.predicts: head},
    )
