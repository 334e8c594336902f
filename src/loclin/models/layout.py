"""Where a family keeps its layers, its norms and its head: a table, and the code that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from loclin.errors import ModelError


@dataclass(frozen=True)
class Weights:
    """Paths, from a layer, of the parts on the linear path: what explicit links multiply with.

    The `_post` norms are those that some families put behind a block.
    """

    attn_norm: str = "input_layernorm"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    attn_post: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_post: str | None = None


@dataclass(frozen=True)
class Layout:
    """Attribute paths of one family's parts.

    `layers` and `final_norm` start at the decoder, `attn` and `mlp` at a layer. `attn` and `mlp` name the module
    whose output is *added to the residual stream*, so that `attn_out` and `mlp_out` mean what they mean in
    TransformerLens: where a norm follows the block, it is that norm. `weights` is given where explicit links know the
    family; generic links serve every other.
    """

    layers: str = "layers"
    final_norm: str = "norm"
    attn: str = "self_attn"
    mlp: str = "mlp"
    weights: Weights | None = None


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(weights=Weights()),
    "gemma3_text": Layout(
        attn="post_attention_layernorm",
        mlp="post_feedforward_layernorm",
        weights=Weights(
            attn_post="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post="post_feedforward_layernorm",
        ),
    ),
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model; `known` is False where the family is not in the table and a Llama's layout was tried."""

    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    head: nn.Module
    layout: Layout
    known: bool

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix `[V, d]`, detached."""
        return cast("Tensor", self.head.weight).detach()


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find a model's layers, final norm and output head.

    Raises
    ------
    ModelError
        When a part is not where the family's layout says.
    """
    decoder = model.get_decoder()
    family = decoder.config.get_text_config().model_type
    layout = LAYOUTS.get(family, Layout())
    try:
        layers = tuple(decoder.get_submodule(layout.layers).children())
        final_norm = decoder.get_submodule(layout.final_norm)
        for layer in layers:
            layer.get_submodule(layout.attn)
            layer.get_submodule(layout.mlp)
    except AttributeError as error:
        raise ModelError(
            f"the model family {family!r} is not one loclin knows ({error}); known: {', '.join(LAYOUTS)}"
        ) from error
    head = model.get_output_embeddings()
    if head is None or not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers or no output head: loclin needs a causal language model"
        )
    return Anatomy(decoder, layers, final_norm, head, layout, family in LAYOUTS)
