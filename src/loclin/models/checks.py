"""Refuses models that cannot become an exact map; from the config alone where possible, before weights load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loclin.errors import ModelError
from loclin.models.lease import OnDisk
from loclin.models.options import WITHOUT_DOUBLE
from loclin.models.task import NAMES, TASKS, Task, auto_class, find_head, find_task, is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN_ATTENTION = ("flash", "flex", "paged")
"""Prefixes of attention implementations that are one kernel, and do not return the probabilities."""


def list_some(names: list[str]) -> str:
    """Join the first few names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_config(config: PreTrainedConfig, name: str, task: Task = "causal") -> None:
    """Refuse, as a causal model, an architecture that has an encoder or attends to later tokens, from its config."""
    kind = config.model_type
    if task != "causal":
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); give a causal decoder, or the task seq2seq")
    # A family that also has a masked-LM class is an encoder, unless its config says it was trained as a
    # decoder. Its "causal LM" class does not help: without `is_decoder` it attends in both directions.
    if kind in NAMES["masked"] and not is_causal(config):
        raise ModelError(f"{name} is an encoder ({kind}, is_decoder=False); give a causal decoder, or the task masked")


def refuse_unknown_family(config: PreTrainedConfig, name: str, task: Task = "causal") -> None:
    """Refuse a checkpoint whose family has no class for the task and brings no code of its own."""
    if auto_class(config, task) is None:
        others = [other for other in TASKS if config.model_type in NAMES[other]]
        hint = f"choose the task {' or '.join(others)}, or " if others else ""
        what = "causal language model" if task == "causal" else f"{task} model"
        raise ModelError(
            f"{name}: transformers has no {what} for the family {config.model_type!r}; {hint}"
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
    refuse_config(hf.config, name, find_task(hf))
    if find_head(hf) is None:
        raise ModelError(
            f"{name} ({type(hf).__name__}) has no output head; load it with AutoModelForCausalLM, or the class of "
            "another task"
        )
    try:
        table = hf.get_input_embeddings()
    except NotImplementedError:  # several tables, such as of characters
        table = None
    if isinstance(table, nn.ModuleList):
        raise ModelError(
            f"{name} ({type(hf).__name__}) reads a row of codes for each of its tables of input embeddings, and a "
            "prompt here is one row of token ids; give a model with one table",
            "input embeddings",
        )
    if not isinstance(getattr(table, "weight", None), torch.Tensor):
        raise ModelError(
            f"{name} ({type(hf).__name__}) has no single table of input embeddings; give a model with one",
            "input embeddings",
        )
    _refuse_kernels(hf, name)
    refuse_devices(hf, name)
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


def refuse_devices(hf: PreTrainedModel, name: str) -> None:
    """Refuse devices without float64, and several devices where nothing moves what passes from one to the next."""
    places = {str(value.device): path for path, value in hf.named_parameters() if not value.is_meta}
    lacking = [place for place in places if torch.device(place).type in WITHOUT_DOUBLE]
    if lacking:
        raise ModelError(
            f"{name} is on {lacking[0]}, which has no float64 to add in: move it to the processor with "
            "model.to('cpu'), or to a CUDA device"
        )
    moved = getattr(hf, "hf_device_map", None) is not None or any(hasattr(part, "_hf_hook") for part in hf.modules())
    if len(places) > 1 and not moved:
        raise ModelError(
            f"{name} is on several devices ({', '.join(f'{path} on {place}' for place, path in places.items())}), and "
            "nothing moves tensors between them: move it to one with model.to(...), or load it with device_map='auto'"
        )


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
