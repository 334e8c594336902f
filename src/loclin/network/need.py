"""What a prompt needs beside the weights, computed from shapes before anything is run.

A layer is counted as autograd runs it on the linear path, since a certificate does so with every layer: what leaves
each matrix, and attention's probabilities, several times over. So the numbers are bounds, and wide for explicit
products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loclin.freeze import FreezeOptions
from loclin.freeze.pattern import BLOCK_BYTES
from loclin.models.forward import keeps_logits
from loclin.models.lease import largest_layer_bytes
from loclin.models.model import Model
from loclin.network.anatomy import find_anatomy
from loclin.network.memory import PATTERNS, Allowance, Budget, allowance

_OUTPUTS = 4  # how often a graph has what leaves a matrix: the model's, the linearised, those of a second backward pass
_STREAMS = 24  # residual streams: a certificate's columns, and copies around norms
_EXPERTS = 5  # copies of a stack of experts' weights, of which autograd takes slices
_HEAD = 12  # rows of logits


def allow(model: Model, length: int, options: FreezeOptions, memory: Budget) -> Allowance:
    """The allowance of a prompt of some length; BudgetError where the budget is too small for it. Nothing is run."""
    hf, anatomy = model.hf, find_anatomy(model.hf)
    config = hf.config.get_text_config()
    embedding = hf.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    vocabulary, d = embedding.shape
    d = max(d, getattr(config, "hidden_size", d))
    size, stock = options.dtype(hf.dtype).itemsize, hf.dtype.itemsize
    layers = [hf] if model.encoder_length else list(anatomy.layers) or [hf]
    values = 2 * size + (stock if stock != size else 0)  # an input, also as the model has it; what attention adds
    chosen, wide = getattr(config, "num_experts_per_tok", None), max(size, 4)
    work = max(_layer_bytes(layer, length, size, chosen) for layer in layers) + length * d * _STREAMS * size
    at_once = 1 if anatomy.layers and not model.encoder_length else getattr(config, "num_hidden_layers", 1)
    work += PATTERNS * at_once * _pattern_bytes(config, length, wide)
    work += vocabulary * (_HEAD + (0 if keeps_logits(hf) else 2 * length)) * wide
    kept = len(layers) * length * d * values + 4 * length * d * size + 2 * length**2 * size
    return allowance(memory, model.device, kept, work + 2 * largest_layer_bytes(hf))


def _pattern_bytes(config: Any, length: int, size: int) -> int:
    """The bytes of one layer's attention probabilities: a block of them where attention is one operation."""
    heads = getattr(config, "num_attention_heads", None) or 1
    whole = heads * length**2 * size
    is_one_operation = getattr(config, "_attn_implementation", None) == "sdpa"
    return min(whole, max(BLOCK_BYTES, heads * length * size)) if is_one_operation else whole


def _layer_bytes(layer: nn.Module, length: int, size: int, chosen: int | None) -> int:
    """The bytes of what leaves a layer's matrices, and of weights that are widened or copied."""
    outputs, copies = 0, 0
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3:  # experts: those that are chosen for a token
                outputs += (chosen or len(weight)) * max(weight.shape[1:])
                copies += _EXPERTS * weight.numel() * size
            elif weight.dim() == 2:
                out = getattr(module, "out_features", None)
                outputs += out if isinstance(out, int) else max(weight.shape)
                copies += weight.numel() * size if weight.dtype.itemsize != size else 0
    return _OUTPUTS * outputs * length * size + copies
