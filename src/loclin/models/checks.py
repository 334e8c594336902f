"""Refuses models that cannot become an exact map; from the config alone where possible, before weights load."""

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
from loclin.models.lease import OnDisk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN_ATTENTION = ("flash", "flex", "paged")
"""Prefixes of attention implementations that are one kernel, and do not return the probabilities."""


def list_some(names: list[str]) -> str:
    """Join the first few names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse an architecture that has an encoder or attends to later tokens, from its config."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); give a causal decoder")
    # A family that also has a masked-LM class is an encoder, unless its config says it was trained as a
    # decoder. Its "causal LM" class does not help: without `is_decoder` it attends in both directions.
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
        raise ModelError(f"{name} is an encoder ({kind}, is_decoder=False); give a causal decoder")


def refuse_unknown_family(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint whose family has no causal-LM class and brings no code of its own."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(config, "auto_map"):
        raise ModelError(
            f"{name}: transformers has no causal language model for the family {config.model_type!r}; "
            "load it yourself and pass it to loclin.wrap()"
        )


def refuse_missing(report: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would replace by random ones with a warning."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks weights that its config asks for: {list_some(missing)}; give a complete checkpoint"
        )


def refuse_model(hf: PreTrainedModel, name: str) -> None:
    """Refuse a model that cannot become an exact map. Cost: one read of all weights."""
    refuse_config(hf.config, name)
    if hf.get_output_embeddings() is None:
        raise ModelError(f"{name} ({type(hf).__name__}) has no output head; load it with AutoModelForCausalLM")
    if not isinstance(getattr(hf.get_input_embeddings(), "weight", None), torch.Tensor):
        raise ModelError(
            f"{name} ({type(hf).__name__}) has no single table of input embeddings; give a model with one",
            "input embeddings",
        )
    _refuse_kernels(hf, name)
    if any(parameter.device.type == "mps" for parameter in hf.parameters()):
        raise ModelError(
            f"{name} is on mps, which has no float64, in which every map is checked: move it, model.to('cpu')"
        )
    # Offloaded weights rest on the meta device too, and are fetched when their layer runs.
    if getattr(hf, "hf_device_map", None) is None:
        empty = [
            f"{path}.{parameter}".strip(".")
            for path, module in hf.named_modules()
            for parameter, value in module.named_parameters(recurse=False)
            if value.is_meta and not hasattr(module, "_hf_hook") and not isinstance(value, OnDisk)
        ]
        if empty:
            raise ModelError(
                f"{name} has parameters without values (meta device): {list_some(empty)}; load its weights"
            )
    if any(parameter.is_inference() for parameter in hf.parameters()):
        raise ModelError(
            f"{name} was loaded inside torch.inference_mode(), whose tensors have no derivatives; load it outside"
        )
    refuse_non_finite(non_finite(hf), name)


def _refuse_kernels(hf: PreTrainedModel, name: str) -> None:
    """Refuse kernels that hide the operations of attention or of layers."""
    if getattr(hf, "use_kernels", False):
        raise ModelError(f"{name} uses kernels from the hub, which hide their operations; load it without use_kernels")
    attention = str(getattr(hf.config.get_text_config(), "_attn_implementation", None))
    if "/" in attention or attention.startswith(HIDDEN_ATTENTION):
        raise ModelError(
            f"{name} computes its attention with {attention}, which hides the probabilities: call "
            "model.set_attn_implementation('sdpa') first, or load it with attn_implementation='sdpa'"
        )


def refuse_non_finite(broken: list[str], name: str) -> None:
    """Refuse a model some of whose parameters, by their names, hold NaN or Inf."""
    if broken:
        raise ModelError(
            f"{name} has weights that are NaN or infinite: {list_some(broken)}; give a checkpoint with finite ones"
        )


def non_finite(module: nn.Module) -> list[str]:
    """The names of parameters with NaN or Inf: by one sum per tensor, and an exact check if it is not finite."""
    names = []
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.is_meta or not value.is_floating_point() or is_traceable_wrapper_subclass(value):
                continue  # the tensors of quantised weights have no sum
            wide = value.float() if value.element_size() == 1 else value  # float8 has no sum
            # A finite tensor may overflow its sum; a tensor with NaN or Inf never has a finite one.
            if not wide.sum().isfinite() and not wide.isfinite().all():
                names.append(name)
    return names
