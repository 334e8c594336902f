"""Attention, y = P V W_O (paper, equations 11 to 14): P = softmax(Q K^T) is frozen; V and W_O stay live.

Attention that a model computes step by step (eager) needs no rule: its softmax is frozen like any other coefficient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loclin.freeze.operation import Operation, Result
from loclin.freeze.status import Coefficient, Live


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The probabilities `[B, H, T_query, T_key]` of `F.scaled_dot_product_attention`.

    Cost: H * T_query * T_key * d_head multiplications and that many probabilities.
    """
    groups = query.shape[-3] // key.shape[-3]
    scores = _grouped(query, key.shape[-3]) @ key.transpose(-2, -1)
    scores = scores.view(*query.shape[:-1], -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dim() > 2 and mask.shape[-3] == key.shape[-3] and groups > 1:
            mask = mask.repeat_interleave(groups, dim=-3)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probs = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return probs.nan_to_num(0.0)  # a query that may attend to nothing


def _grouped(per_query_head: Tensor, n_kv_heads: int) -> Tensor:
    """`[B, H, T, n]` as `[B, H_kv, H/H_kv * T, n]`: grouped queries share a key head without a copy of it."""
    return per_query_head.reshape(*per_query_head.shape[:-3], n_kv_heads, -1, per_query_head.shape[-1])


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

    if ordinary:
        query, key = _live(op, query), _live(op, key)
    mask, is_causal, scale = op.get(3, "attn_mask"), op.get(5, "is_causal", False), op.get(6, "scale")
    probs = probabilities(query, key, mask, is_causal=is_causal, scale=scale)
    op.context.keep_probabilities(probs.detach())
    if status is None and not ordinary:
        return op.coefficient()
    live = _live(op, value)
    probs = probs.to(op.context.dtype)
    mixed = (_grouped(probs, live.shape[-3]) @ live).view(*probs.shape[:-1], live.shape[-1])
    return status.then(mixed) if isinstance(status, Live) else Live(mixed)
