"""A model's decoder, layers and output head, found by inspection: a new family needs no line here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.models.blocks import find_blocks
from loclin.models.task import find_head


@dataclass(frozen=True)
class Weights:
    """Paths, from a layer, of the modules that explicit products multiply with.

    The `_norm`s stand before attention and MLP, the `_post` ones behind them; None where there is none. `fused`: v is
    the last part of one matrix with q and k, and the gate is the first half of one matrix with up.
    """

    attn_norm: str | None = "input_layernorm"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    attn_post: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_post: str | None = None
    fused: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """The paths of the modules with a weight matrix."""
        return self.v, self.o, self.gate, self.up, self.down

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        norms = (self.attn_norm, self.attn_post, self.mlp_norm, self.mlp_post)
        return (*self.matrices, *(path for path in norms if path is not None))


_NORMS_BEHIND = Weights(
    attn_norm=None, attn_post="post_attention_layernorm", mlp_norm=None, mlp_post="post_feedforward_layernorm"
)
_FOUR_NORMS = replace(_NORMS_BEHIND, attn_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm")
_FUSED = Weights(v="self_attn.qkv_proj", gate="mlp.gate_up_proj", up="mlp.gate_up_proj", fused=True)
EXPLICIT: dict[str, Weights] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), Weights()),
    **dict.fromkeys(("gemma2", "gemma3_text"), _FOUR_NORMS),
    **dict.fromkeys(("olmo2", "olmo3"), _NORMS_BEHIND),
    "phi3": _FUSED,
}
"""Families whose layers have explicit products; all others have generic products, by autograd."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model."""

    decoder: nn.Module  # of texts
    layers: tuple[nn.Module, ...]
    head: nn.Module
    weights: Weights | None  # None where the family has no explicit products

    __repr__ = brief


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find a model's parts; ModelError without an output head. Cost: a walk over its modules."""
    decoder: nn.Module | None = model.get_decoder()
    if decoder is None or decoder is model:
        decoder = model.base_model
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        decoder = decoder.base_model  # a causal model as the decoder of an encoder-decoder
    head = find_head(model)
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} has no output head: give a language model or a classifier")
    family = model.config.get_text_config().model_type
    layers, weights = find_blocks(decoder) or find_blocks(model), EXPLICIT.get(family)
    known = weights is not None and all(_has(layer, weights) for layer in layers)
    return Anatomy(decoder, layers, head, weights if known else None)


def _has(layer: nn.Module, weights: Weights) -> bool:
    """Whether a layer is transformers' own, with every part in its place; custom code may reuse a family's config."""
    own = type(layer).__module__.startswith("transformers.models.")
    return own and set(weights.paths) <= {path for path, _ in layer.named_modules()}
