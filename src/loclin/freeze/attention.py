"""Attention, y = P V W_O (paper, equations 11 to 14): P = softmax(Q K^T) is frozen; V and W_O stay live.

Attention that a model computes step by step (eager) needs no rule: its softmax is frozen like any other coefficient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loclin.errors import ModelError
from loclin.freeze.operation import Operation, Result
from loclin.freeze.options import SharedAttention
from loclin.freeze.pattern import BlockPattern, by_head, grouped, mix, probabilities
from loclin.freeze.scores import ScoreRow
from loclin.freeze.status import Coefficient, Live


def _live(op: Operation, tensor: Tensor) -> Tensor:
    status = op.status(tensor)
    return status.linear if isinstance(status, Live) else op.cast(tensor)


def attention(op: Operation) -> Result:
    """`F.scaled_dot_product_attention` with frozen probabilities; for the ordinary Jacobian they are live."""
    query, key, value = (op.get(i, name) for i, name in enumerate(("query", "key", "value")))
    status = op.status(value)
    ordinary = op.context.options.ordinary
    if isinstance(status, Coefficient):
        return Coefficient(status.origin)
    if op.get(4, "dropout_p", 0.0) > 0:  # its probabilities are random at each call
        return op.coefficient()

    if op.context.scores is not None:
        _read_scores(op, op.context.scores, query, key)
    if op.context.options.shared is not None:
        return _shared(op, query, key, value, op.context.options.shared)
    if ordinary:
        query, key = _live(op, query), _live(op, key)
    mask, is_causal, scale = op.get(3, "attn_mask"), op.get(5, "is_causal", False), op.get(6, "scale")
    most = op.context.attention_bytes
    pattern = None
    if not ordinary and most is not None and _is_larger(query, key, most):
        pattern = BlockPattern(query.detach(), key.detach(), mask, is_causal, scale, op.context.dtype, most)
        op.context.keep_pattern(pattern)
    else:
        probs = probabilities(query, key, mask, is_causal=is_causal, scale=scale)
        op.context.keep_probabilities(probs.detach())
    if status is None and not ordinary:
        return op.constant()  # attention to what does not depend on the input, such as sound
    if op.context.repeats(op.out):
        mixed = op.out.detach()
    elif pattern is not None:
        mixed = mix(pattern, _live(op, value))
    else:
        live = _live(op, value)
        probs = probs.to(op.context.dtype)
        mixed = (grouped(probs, live.shape[-3]) @ live).view(*probs.shape[:-1], live.shape[-1])
    if pattern is not None and op.context.see_mixing is not None:
        op.context.see_mixing(_live(op, value), mixed)
    return status.then(mixed) if isinstance(status, Live) else Live(mixed)


def _shared(op: Operation, query: Tensor, key: Tensor, value: Tensor, weights: SharedAttention) -> Result:
    """Attention whose queries, keys and values are all live, each with its gradient times its weight."""
    q, k, v = (
        _scale_gradient(_live(op, tensor), weight)
        for tensor, weight in ((query, weights.query), (key, weights.key), (value, weights.value))
    )
    mask, is_causal, scale = op.get(3, "attn_mask"), op.get(5, "is_causal", False), op.get(6, "scale")
    probs = probabilities(q, k, mask, is_causal=is_causal, scale=scale).to(op.context.dtype)
    return Live((grouped(probs, v.shape[-3]) @ v).view(*probs.shape[:-1], v.shape[-1]))


def _read_scores(op: Operation, scores: ScoreRow, query: Tensor, key: Tensor) -> None:
    """Compute the row of scores that is read. Cost: S products of d_head numbers."""
    q, k = _live(op, query), _live(op, key)
    scores.factors = [(q, k)]
    heads, n_keys = q.shape[-3], k.shape[-2]
    if not -heads <= scores.head < heads:
        return
    head, at = scores.head % heads, scores.query
    mask, scale = op.get(3, "attn_mask"), op.get(6, "scale")
    keys = k[..., head // (heads // k.shape[-3]), :, :].flatten(0, -2)
    row = keys @ q[..., head, at, :].flatten() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if op.get(5, "is_causal", False):
        row = row.masked_fill(torch.arange(n_keys, device=row.device) > at, -math.inf)
    if mask is not None:
        own = by_head(mask, q, k).expand(*q.shape[:-1], n_keys)[..., head, at, :].flatten()
        if own.dtype == torch.bool:
            row = row.masked_fill(~own, -math.inf)
        else:
            row = row + op.context.constant(op.cast(own), own, "attn_mask")
    scores.row = row


def softmax(op: Operation) -> Result:
    """A softmax is a frozen coefficient, perhaps attention probabilities."""
    status = op.status(op.get(0, "input"))
    if op.context.scores is not None and isinstance(status, Live) and status.linear.dim() > 2:
        op.context.scores.take(status.linear)
    return op.coefficient(probabilities=True)


def _scale_gradient(value: Tensor, weight: float) -> Tensor:
    """The same value, with its gradient times a weight."""
    return weight * value + (1 - weight) * value.detach()


def check_not_shared(op: Operation) -> None:
    """Refuse an attention step by step where it is to be shared: its softmax is a frozen coefficient."""
    if op.context.options.shared is not None:
        raise ModelError(
            "shared attention needs a model whose attention is one operation: load it with attn_implementation='sdpa'"
        )


def unmixed(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
    """Zeros in the place of what `F.scaled_dot_product_attention` gives."""
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _is_larger(query: Tensor, key: Tensor, most: int) -> bool:
    """Whether the probabilities of one sequence `[1, H, T, S]` are larger than so many bytes."""
    itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
    one = query.dim() == key.dim() == 4 and query.shape[0] == 1
    return one and query.shape[1] * query.shape[2] * key.shape[2] * itemsize > most
