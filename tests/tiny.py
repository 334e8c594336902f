"""Tiny random models on the real code paths of transformers, every nonlinearity away from its linear range."""

from __future__ import annotations

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 61
DEVICE = "cpu"
"""Where the models and prompts are; set by the tests' option --device."""
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _shaken(model: PreTrainedModel, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Random gains and biases that are not zero or one, and weights large enough to bend every activation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.to(DEVICE, dtype).eval()


def rounding(dtype: torch.dtype = torch.float32, layers: int = 3, terms: int = 40) -> float:
    """How far rounding alone may move a network's output, relative to it, on a processor that adds in any order.

    A sum of n terms misses by about sqrt(n) units in the last place, each layer has its share, and what is summed may
    be some times as large as the sum. Where a model casts to float32 within (most norms do), float32 counts, whatever
    its dtype.
    The worst that kernels with and without vector instructions make of the networks here is a tenth of this.
    """
    return 6 * layers * terms**0.5 * torch.finfo(dtype).eps


def llama(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attn: str = "sdpa",
    biases: bool = False,
    tied: bool = False,
    layers: int = 3,
) -> PreTrainedModel:
    """A Llama with grouped queries."""
    config = LlamaConfig(
        **{**_SIZES, "num_hidden_layers": layers},
        attention_bias=biases,
        mlp_bias=biases,
        tie_word_embeddings=tied,
        attn_implementation=attn,
    )
    return _shaken(LlamaForCausalLM(config), seed, dtype)


def gemma3(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, attn: str = "sdpa", bidirectional: bool = False
) -> PreTrainedModel:
    """A Gemma 3 with a sliding window shorter than the prompts, full attention in between, and four norms a layer."""
    config = Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        use_bidirectional_attention=bidirectional,
        attn_implementation=attn,
    )
    return _shaken(Gemma3ForCausalLM(config), seed, dtype)


def prompt(length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids `[1, length]`."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
