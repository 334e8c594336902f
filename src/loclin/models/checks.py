"""Which models are refused, and why: said before weights load where the config already tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from loclin.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAMES_SHOWN = 3
HIDDEN_ATTENTION = ("flash", "flex", "paged")
"""How the attention implementations begin that are one kernel, without a result that tells who looks at whom."""


def some(names: list[str]) -> str:
    """Join the first few names, and say how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def refuse_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse an architecture that is no causal decoder, from its config alone.

    Raises
    ------
    ModelError
        When the model has an encoder, or looks at later tokens.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); loclin needs a causal decoder.")
    # A family that also has a masked-LM class is an encoder, unless its config says it was trained as a
    # decoder. Its "causal LM" class does not help: without `is_decoder` it attends in both directions.
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        raise ModelError(f"{name} is an encoder ({kind}, is_decoder=False); loclin needs a causal decoder.")


def refuse_unknown_family(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint that transformers cannot open as a causal language model.

    Raises
    ------
    ModelError
        When the family has no causal-LM class and brings no code of its own.
    """
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(config, "auto_map"):
        raise ModelError(
            f"{name}: transformers has no causal language model for the family {config.model_type!r}; "
            "load it yourself and pass it to loclin.wrap()."
        )


def refuse_missing(report: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that lacks weights: transformers makes up random ones and only warns.

    Raises
    ------
    ModelError
        Naming the first few.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{name} lacks weights that its config asks for: {some(missing)}.")


def refuse_model(hf: PreTrainedModel, name: str) -> None:
    """Refuse a model that cannot become an exact map: no decoder, no head, no weights, or weights with holes.

    Cost: one read of all weights.

    Raises
    ------
    ModelError
        Naming what is wrong, and the first few parameters where weights are at fault.
    """
    refuse_config(hf.config, name)
    if hf.get_output_embeddings() is None:
        raise ModelError(
            f"{name} ({type(hf).__name__}) has no output embeddings; load it with its language-model head "
            "(AutoModelForCausalLM)."
        )
    if not isinstance(getattr(hf.get_input_embeddings(), "weight", None), torch.Tensor):
        raise ModelError(f"{name} ({type(hf).__name__}) has no single table of input embeddings.", "input embeddings")
    _refuse_kernels(hf, name)
    # Offloaded weights rest on the meta device too, and are fetched when their layer runs.
    if getattr(hf, "hf_device_map", None) is None:
        empty = [
            f"{path}.{parameter}".strip(".")
            for path, module in hf.named_modules()
            for parameter, value in module.named_parameters(recurse=False)
            if value.is_meta and not hasattr(module, "_hf_hook")
        ]
        if empty:
            raise ModelError(f"{name} has parameters without values (meta device): {some(empty)}.")
    if any(parameter.is_inference() for parameter in hf.parameters()):
        raise ModelError(
            f"{name} was loaded inside torch.inference_mode(), whose tensors have no derivatives; load it outside."
        )
    broken = non_finite(hf)
    if broken:
        raise ModelError(f"{name} has weights that are NaN or infinite: {some(broken)}.")


def _refuse_kernels(hf: PreTrainedModel, name: str) -> None:
    """Refuse attention and layers that run where no operation can be seen."""
    if getattr(hf, "use_kernels", False):
        raise ModelError(
            f"{name} uses kernels from the hub, which loclin cannot look into; load it without use_kernels."
        )
    attention = str(getattr(hf.config.get_text_config(), "_attn_implementation", None))
    if "/" in attention or attention.startswith(HIDDEN_ATTENTION):
        raise ModelError(
            f"{name} computes its attention with {attention}, which loclin cannot look into: "
            "model.set_attn_implementation('sdpa') first, or load it with attn_implementation='sdpa'."
        )


def non_finite(module: nn.Module) -> list[str]:
    """Name the parameters that hold NaN or Inf: one sum per tensor, an exact look where it is not finite."""
    names = []
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.is_meta or not value.is_floating_point() or is_traceable_wrapper_subclass(value):
                continue  # what stands in for a quantised weight has no sum
            wide = value.float() if value.element_size() == 1 else value  # float8 has no sum
            # A finite tensor may overflow its sum; a tensor with NaN or Inf never has a finite one.
            if not wide.sum().isfinite() and not wide.isfinite().all():
                names.append(name)
    return names
