"""A slow independent oracle: the model's own classes with `detach` written into them, and one backward pass per row.

Nothing here uses loclin: forwards are replaced on the classes, attention is written out, and J is built row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama


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


@contextmanager
def detached(gate: str = "activation") -> Iterator[None]:
    """Rewrite the Llama and Gemma 3 classes; models must have been built with eager attention."""
    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", _llama_norm),
        mock.patch.object(modeling_gemma3.Gemma3RMSNorm, "forward", _gemma_norm),
        mock.patch.object(modeling_llama.LlamaMLP, "forward", _mlp(gate)),
        mock.patch.object(modeling_gemma3.Gemma3MLP, "forward", _mlp(gate)),
        mock.patch.object(modeling_llama, "eager_attention_forward", _attention),
        mock.patch.object(modeling_gemma3, "eager_attention_forward", _attention),
    ):
        yield


def jacobian(
    model: PreTrainedModel, ids: Tensor, position: int, gate: str = "activation", rows: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """J `[d_out, T, d]` (or the rows asked for), x `[T, d]` and y `[d_out]` of embed -> final, by brute force."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with detached(gate), torch.enable_grad():
        y = model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state[0, position]
        wanted = range(len(y)) if rows is None else rows
        J = torch.stack([torch.autograd.grad(y[row], x, retain_graph=True)[0][0] for row in wanted])
    return J, x[0].detach(), y.detach()
