"""Shares by brute force: the model's own classes with `detach` written into them, hooks, and autograd through it all.

Nothing here uses loclin. For Llama and Gemma 3, whose attention adds to the stream by `ATTN` and MLP by `MLP`.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

import oracle

ATTN = {"llama": "self_attn", "gemma3_text": "post_attention_layernorm"}
MLP = {"llama": "mlp", "gemma3_text": "post_feedforward_layernorm"}


class Network:
    """One pass through the rewritten model, with every tensor of interest in its graph.

    `x` `[1, T, d]` enters layer 0, `pre` each layer; `attn` and `mlp` are what each adds to the stream; `z` enters
    each attention's output projection, `act` each MLP's; `stream` is what leaves the last layer.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, gate: str = "activation") -> None:
        family = model.config.model_type
        self.model = model
        self.x = model.get_input_embeddings()(ids).detach().requires_grad_()
        self.pre, self.attn, self.mlp, self.z, self.act, self.stream = [], [], [], [], [], []

        def given(store):
            return lambda _m, _a, out: store.append(out if isinstance(out, Tensor) else out[0])

        def entered(store):
            return lambda _m, args: store.append(args[0])

        with oracle.detached(gate), torch.enable_grad(), ExitStack() as stack:
            for layer in model.model.layers:
                for hook in (
                    layer.register_forward_pre_hook(entered(self.pre)),
                    getattr(layer, ATTN[family]).register_forward_hook(given(self.attn)),
                    getattr(layer, MLP[family]).register_forward_hook(given(self.mlp)),
                    layer.self_attn.o_proj.register_forward_pre_hook(entered(self.z)),
                    layer.mlp.down_proj.register_forward_pre_hook(entered(self.act)),
                ):
                    stack.callback(hook.remove)
            stack.callback(model.model.norm.register_forward_pre_hook(entered(self.stream)).remove)
            self.final = model.get_decoder()(inputs_embeds=self.x, use_cache=False).last_hidden_state
            self.logits = model.lm_head(self.final)

    def reading(self, weights: Tensor, position: int) -> Tensor:
        """What the product of the logits at a position with `weights` multiplies the end of the stream with `[d]`."""
        return self.vjp((self.logits[0, position] * weights).sum(), self.stream[0])[0, position].detach()

    def vjp(self, scalar: Tensor, source: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(scalar, source, retain_graph=True, allow_unused=True)
        return torch.zeros_like(source) if pulled is None else pulled

    def by_token(self, scalar: Tensor) -> Tensor:
        """What each token gives of a scalar, `[T]`."""
        return (self.vjp(scalar, self.x) * self.x).sum(-1)[0].detach()

    def by_head(self, scalar: Tensor, layer: int) -> Tensor:
        """What passes each head on the way to a scalar, `[H]`."""
        z = self.z[layer]
        heads = self.model.config.num_attention_heads
        return (self.vjp(scalar, z) * z).unflatten(-1, (heads, -1)).sum((0, 1, 3)).detach()

    def by_neuron(self, scalar: Tensor, layer: int) -> Tensor:
        """What passes each neuron on the way to a scalar, `[f]`."""
        act = self.act[layer]
        return (self.vjp(scalar, act) * act).sum((0, 1)).detach()
