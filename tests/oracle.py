"""A slow independent oracle: the model's own classes with `detach` written into them, and one backward pass per row.

Nothing here uses loclin: forwards are replaced on the classes, attention is written out, and J is built row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl


def _llama_norm(self, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
    return self.weight * (x * scale)


def _gemma_norm(self, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()
    return x * scale * (1.0 + self.weight)


def _mlp(gate: str):
    def forward(self, x: Tensor) -> Tensor:
        z, up = self.gate_proj(x), self.up_proj(x)
        act = self.act_fn(z)
        through_up = act.detach() * up
        through_gate = (act / z).detach() * z * up.detach()
        product = {"activation": through_up, "up": through_gate, "half": (through_up + through_gate) / 2}[gate]
        return self.down_proj(product)

    return forward


def _attention(module, query, key, value, attention_mask, scaling, **_kwargs):
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    return (scores.softmax(-1).detach() @ value).transpose(1, 2).contiguous(), None


_FAMILIES = (
    (modeling_llama, "LlamaRMSNorm", "LlamaMLP"),
    (modeling_gemma3, "Gemma3RMSNorm", "Gemma3MLP"),
    (modeling_qwen2_vl, "Qwen2VLRMSNorm", "Qwen2MLP"),
    (modeling_qwen2_5_vl, "Qwen2_5_VLRMSNorm", "Qwen2MLP"),
    (modeling_qwen3_vl, "Qwen3VLTextRMSNorm", "Qwen3VLTextMLP"),
)


@contextmanager
def detached(gate: str = "activation") -> Iterator[None]:
    """Rewrite the text classes of Llama, Gemma 3 and Qwen-VL; models must have been built with eager attention."""
    with ExitStack() as patches:
        for module, norm, mlp in _FAMILIES:
            own = _gemma_norm if module is modeling_gemma3 else _llama_norm
            patches.enter_context(mock.patch.object(getattr(module, norm), "forward", own))
            patches.enter_context(mock.patch.object(getattr(module, mlp), "forward", _mlp(gate)))
            patches.enter_context(mock.patch.object(module, "eager_attention_forward", _attention))
        yield


def jacobian(
    model: PreTrainedModel, ids: Tensor, position: int, gate: str = "activation", rows: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """J `[d_out, T, d]` (or the rows asked for), x `[T, d]` and y `[d_out]` of embed -> final, by brute force."""
    return _rows(model, {"inputs_embeds": model.get_input_embeddings()(ids)}, position, gate, rows)


def given_jacobian(
    model: PreTrainedModel, given: dict[str, Tensor], position: int, gate: str = "activation"
) -> tuple[Tensor, Tensor, Tensor]:
    """As `jacobian`, of the decoder inside a model, at what the whole model gives it: images in the place of tokens."""
    seen: list[dict[str, Any]] = []
    handle = model.get_decoder().register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**given, use_cache=False)
    handle.remove()
    return _rows(model, seen[0], position, gate, None)


def _rows(
    model: PreTrainedModel, given: dict[str, Any], position: int, gate: str, rows: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    x = given["inputs_embeds"].detach().clone().requires_grad_()
    with detached(gate), torch.enable_grad():
        y = model.get_decoder()(**{**given, "inputs_embeds": x, "use_cache": False}).last_hidden_state[0, position]
        wanted = range(len(y)) if rows is None else rows
        J = torch.stack([torch.autograd.grad(y[row], x, retain_graph=True)[0][0] for row in wanted])
    return J, x[0].detach(), y.detach()
