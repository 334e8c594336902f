"""Attention: the probabilities are held, so all of Q and K; V and the output projection stay live. Equations 11 to 14.

Every model asks transformers' attention registry for its attention function at each call. For the time of the context
the registry's entry is one that calls the stock function for the value and adds the frozen linear path to its
gradient. The masks, and so the value, are those of the implementation the model was loaded with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loclin.freeze.hold import Hold, with_value_of

Keep = Callable[[Tensor], Tensor]
"""What to remember of a module's attention probabilities."""


def probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    upcast: bool = True,
) -> Tensor:
    """The attention probabilities `[B, H, T_query, T_key]`, as eager attention computes them.

    Cost: H * T_query * T_key * d_head multiplications and that many probabilities.
    """
    groups = query.shape[1] // key.shape[1]
    scores = _grouped(query, key.shape[1]) @ key.transpose(2, 3)
    scores = scores.view(*query.shape[:3], -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.shape[-3:-2] == (key.shape[1],) and groups > 1:
            mask = mask.repeat_interleave(groups, dim=-3)
        mask = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    dtype = torch.promote_types(query.dtype, torch.float32) if upcast else query.dtype
    return torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)


def _grouped(per_query_head: Tensor, n_kv_heads: int) -> Tensor:
    """`[B, H, T, n]` as `[B, H_kv, H/H_kv * T, n]`: grouped queries share a key head without copying it."""
    return per_query_head.reshape(per_query_head.shape[0], n_kv_heads, -1, per_query_head.shape[-1])


def _mix(probs: Tensor, value: Tensor) -> Tensor:
    mixed = _grouped(probs, value.shape[1]) @ value
    return mixed.view(*probs.shape[:3], value.shape[-1]).transpose(1, 2)


def _stock_function(module: nn.Module) -> Callable:
    """The eager attention that the model's own file falls back to; it is in no registry."""
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"]


def _frozen(
    stock: Callable | None, names: Mapping[int, str], hold: Hold, keep: Keep | None, held: dict[str, Tensor]
) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        function = stock or _stock_function(module)
        if id(module) not in names:
            return function(module, query, key, value, attention_mask, **kwargs)
        with torch.no_grad():
            orig, weights = function(module, query, key, value, attention_mask, **kwargs)
        with torch.set_grad_enabled(hold.ordinary and torch.is_grad_enabled()):
            probs = probabilities(
                module,
                query,
                key,
                attention_mask,
                scaling=kwargs.get("scaling"),
                softcap=kwargs.get("softcap"),
                is_causal=kwargs.get("is_causal"),
                upcast=hold.precision == "stock",
            )
        if keep is not None:
            held[names[id(module)]] = keep(probs.detach())
        return with_value_of(orig, _mix(probs, value), hold, names[id(module)]), weights

    return attention


@contextmanager
def held_attention(
    names: Mapping[int, str], modules: list[nn.Module], hold: Hold, keep: Keep | None = None
) -> Iterator[dict[str, Tensor]]:
    """Hold the attention probabilities of the modules in `names` (by id); others run as they are.

    Yields what `keep` makes of the probabilities `[1, H, T, T]`, by the module's path, as the forward pass comes by.

    The registry is transformers' own, shared by the process: what was in it is put back at the end.
    """
    files = {type(module).__module__ for module in modules}
    registries = {
        id(registry): registry
        for file in files
        if (registry := vars(sys.modules[file]).get("ALL_ATTENTION_FUNCTIONS")) is not None
    }
    chosen = {
        implementation
        for module in modules
        if (implementation := getattr(getattr(module, "config", None), "_attn_implementation", None)) is not None
    }
    before = [
        (registry, name, registry._local_mapping.get(name)) for registry in registries.values() for name in chosen
    ]
    held: dict[str, Tensor] = {}
    try:
        for registry, name, _ in before:
            registry[name] = _frozen(registry.get(name), names, hold, keep, held)
        yield held
    finally:
        for registry, name, local in before:
            if local is None:
                registry._local_mapping.pop(name, None)
            else:
                registry[name] = local
