"""A tiny random model of every family that transformers knows as a model of a task."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from loclin.errors import ModelError
from loclin.models.quiet import quiet
from loclin.models.task import AUTO, NAMES, Task
from loclin.models.tiny_sizes import (
    BIAS_FREE,
    BIASES,
    CAUSAL,
    FAMILIES,
    KINDS,
    LATENT,
    LAYERS,
    PARTS,
    REFUSED,
    SINGLE,
    SIZES,
    VOCABULARY,
)

# parameters that set decays and time steps: far from where they start, states explode or die
DELICATE = ("A_log", "dt_bias", "dt_proj.bias", "time_", "recurrent_param", "decay", "igate", "fgate")
SPECIAL = ("pad", "bos", "eos", "decoder_start", "unk", "mask", "sep", "cls", "image", "video", "audio")
LEARNED_BUFFERS = ("correction_bias", "expert_bias", "balancing_biases", "layer_scalar")


def families(task: Task = "causal") -> tuple[str, ...]:
    """Name every family that `build` tries: the model types with a model of the task."""
    return tuple(sorted(NAMES[task]))


def build(
    family: str,
    *,
    task: Task = "causal",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attn: str | None = None,
) -> PreTrainedModel:
    """Build a family's tiny model in eval mode, with `attn` if it can, and weights far from where training starts."""
    if family not in NAMES[task]:
        kind = "causal language" if task == "causal" else task
        raise ModelError(
            f"transformers has no {kind} model for the family {family!r}: choose one of tiny.families({task!r})"
        )
    if family in REFUSED:
        raise ModelError(f"there is no tiny {family}: {REFUSED[family]}")
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _marked_garbage():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            model = _model(family, task, attn)
        except Exception as fault:  # as many kinds as there are families
            raise ModelError(f"there is no tiny {family} here: {_reason(fault)}") from fault
        _fill(model, seed)
        nn.Module.to(model, dtype).eval()
        for path, module in model.named_modules():
            if path.endswith(SINGLE.get(family, ())):
                module.float()
        return model


def prompt(model: PreTrainedModel, length: int = 7, seed: int = 1) -> Tensor:
    """Draw random token ids `[1, length]`, none of them special."""
    special = _special_ids(model.config)
    size = getattr(model.config.get_text_config(), "vocab_size", VOCABULARY)  # characters are without one
    ordinary = torch.tensor([i for i in range(size) if i not in special])
    drawn = torch.randint(len(ordinary), (1, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[drawn]


def _config(
    kind: type[PreTrainedConfig], family: str, task: Task, more: dict[str, Any] | None = None
) -> PreTrainedConfig:
    own = FAMILIES.get(family, {}) | (CAUSAL.get(family, {}) if task == "causal" else {}) | (more or {})
    names = [field.name for field in dataclasses.fields(kind)]
    changes = {name: own[name] for name in kind.sub_configs if name in own}  # some defaults contradict themselves
    usual = kind(**{name: KINDS[name] for name in names if name in KINDS}, **changes)
    sizes = {name: size for name in names if (size := _size(name, usual, family)) is not None}
    latent = LATENT if "kv_lora_rank" in names else {}
    parts = {
        name: _config(type(value), value.model_type, task, own.get(name))
        for name, value in vars(usual).items()
        if isinstance(value, PreTrainedConfig)
    }
    direction = {"is_decoder": task == "causal"} if "is_decoder" in names else {}
    return kind(**{**sizes, **latent, **direction, **own, **parts})


def _size(name: str, usual: PreTrainedConfig, family: str) -> Any:
    """A field's tiny value; None if it keeps its own."""
    if name in SIZES or name in KINDS:
        return {**SIZES, **KINDS}[name]
    value = vars(usual).get(name)
    if name in BIASES:
        return None if family.startswith(BIAS_FREE) else True
    if _holds_ids(name) and value is not None:
        small = next((i for i, start in enumerate(SPECIAL) if name.startswith(start)), len(SPECIAL))
        return [small] if isinstance(value, list) else small
    if "drop" in name and isinstance(value, float):
        return 0.0
    if isinstance(value, (list, tuple)) and len(value) == getattr(usual, "num_hidden_layers", None):
        kinds = list(dict.fromkeys(value))
        indices_or_sizes = all(isinstance(kind, int) and kind > 1 for kind in kinds)
        if len(kinds) <= LAYERS and not indices_or_sizes:
            # attention goes round and MLPs stay at the last kind, so that more than one pair of kinds occurs
            rest = kinds[-1:] if name.startswith("mlp") else kinds
            return [*kinds, *rest, *rest][:LAYERS] if len(kinds) > 1 else kinds * LAYERS
    return None


def _holds_ids(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_ids", "pad_index", "bos_index", "eos_index"))


def _special_ids(config: PreTrainedConfig) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= _special_ids(value)
        elif _holds_ids(name) and value is not None:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


def _model(family: str, task: Task, attn: str | None) -> PreTrainedModel:
    settings: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    whole = _config(CONFIG_MAPPING[family], family, task)
    if getattr(whole, "is_encoder_decoder", False) and getattr(whole, "decoder_start_token_id", None) is None:
        whole.decoder_start_token_id = SPECIAL.index("decoder_start")
    make: Any = AUTO[task].from_config
    if family in PARTS and task == "causal":
        make = cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)])._from_config
        whole = getattr(whole, PARTS[family])
    if attn is not None:
        try:
            return make(copy.deepcopy(whole), attn_implementation=attn, **settings)
        except (ValueError, ImportError):  # the family has no such attention
            pass
    return make(whole, **settings)


def _reason(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    # a package's absence is said first and explained after; a validator's complaint comes after its name
    return lines[0].split(" You can install")[0] if isinstance(fault, ImportError) else lines[-1]


@contextmanager
def _marked_garbage() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that parameters without initialisation can be recognised."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = fill


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_weights(module, f"{path}.{name}", parameter, noise))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name.endswith(LEARNED_BUFFERS):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def _weights(module: nn.Module, name: str, start: Tensor, noise: Tensor) -> Tensor:
    start = start.nan_to_num()  # NaN: never initialised
    if name.endswith(".D") or any(part in name for part in DELICATE):
        return start + 0.05 * noise
    if isinstance(module, nn.Embedding):
        return noise
    gains = start.dim() > 1 and start.numel() > 1 and bool((start == start.flatten()[0]).all() and start.any())
    if start.dim() < 2 or gains:
        return start + 0.3 * noise
    return noise * 1.5 * _fan_in(module, start) ** -0.5


def _fan_in(module: nn.Module, weights: Tensor) -> int:
    if isinstance(module, Conv1D):  # [in, out], unlike everything else
        return weights.shape[0]
    if type(module).__module__ == nn.Conv1d.__module__:
        return math.prod(weights.shape[1:])
    return weights.shape[-1]
