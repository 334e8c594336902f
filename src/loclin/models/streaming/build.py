"""Builds a transformers model around a checkpoint: all of it is in memory but the decoder layers' weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from loclin.errors import ModelError
from loclin.models.blocks import find_blocks
from loclin.models.checks import list_some, non_finite, refuse_non_finite
from loclin.models.lease import LayerOnDisk, OnDisk, attach, weights_of
from loclin.models.replica import CHANGE_THEIR_WEIGHTS
from loclin.models.streaming.checkpoint import Checkpoint
from loclin.models.streaming.conversion import find_places
from loclin.models.streaming.plan import Places, Plan, read
from loclin.models.streaming.quantised import find_quantised
from loclin.models.streaming.reader import LayerReader
from loclin.models.task import auto_class

_HALF = (torch.float16, torch.bfloat16)


def build(
    config: PreTrainedConfig, directory: Path, name: str, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """Build the model, in eval mode.

    ModelError where the files are damaged, or their tensors do not fit the modules' names and shapes; where weights are
    NaN or infinite; or the family cannot be built in this way. Cost: one read of all weights.
    """
    with torch.device("meta"):
        chosen = {} if attention is None else {"attn_implementation": attention}
        hf: Any = auto_class(config, "causal").from_config(config, dtype=dtype, **chosen)
    _refuse_family(hf, name, dtype)
    settings = getattr(config, "quantization_config", None)
    checkpoint = Checkpoint(directory, quantised=settings is not None)
    quantised = () if settings is None else find_quantised(checkpoint, settings, name)
    places = find_places(hf, checkpoint, name, quantised)
    plans = _fit(hf, places, checkpoint, name, dtype)
    _fill_buffers(hf, places, checkpoint, name)
    layers = find_blocks(hf.get_decoder() or hf) or find_blocks(hf)
    paths = {module: path for path, module in hf.named_modules()}
    reader = _attach_layers(layers, [paths[layer] for layer in layers], plans, checkpoint, name)
    _load_rest(hf, plans, checkpoint)
    _refuse_empty(hf, name)
    _refuse_non_finite(layers, [paths[layer] for layer in layers], name)
    reader.bytes_read = 0
    if (directory / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(directory)
    hf.name_or_path = config.name_or_path
    found: PreTrainedModel = hf.eval()
    return found


def _refuse_family(hf: Any, name: str, dtype: torch.dtype) -> None:
    """Refuse families that need more than their checkpoint's tensors as they are."""
    kinds = {type(module).__name__ for module in hf.modules()}
    if kinds & set(CHANGE_THEIR_WEIGHTS):
        raise ModelError(f"{name} ({hf.config.model_type}) changes its weights while it runs: load it without stream")
    wide = set(hf._keep_in_fp32_modules_strict) | (set(hf._keep_in_fp32_modules) if dtype == torch.float16 else set())
    if dtype in _HALF and wide:
        raise ModelError(
            f"{name} ({hf.config.model_type}) keeps {list_some(sorted(wide))} in float32: stream it with "
            "dtype='float32', or load it without stream"
        )


def _fit(
    hf: Any, places: Mapping[str, list[Places]], checkpoint: Checkpoint, name: str, dtype: torch.dtype
) -> dict[str, Plan]:
    """Plan what each parameter is read from; those that share a parameter share one plan."""
    found: dict[str, Plan] = {}
    for names in _same(hf):
        stored = [place for own in names for place in places.get(own, [])]
        if not stored:
            raise ModelError(
                f"{name} lacks weights that its config asks for, by their name in the model: {names[0]}; give a "
                "complete checkpoint, or load it without stream, in case transformers knows it by another name"
            )
        shape = hf.get_parameter(names[0]).shape
        for place in stored:
            if place.shape != shape:
                (first, _), *more = place.pieces
                what = f"{first.name} and {len(more)} more, {names[0]} together, have" if more else f"{first.name} has"
                raise ModelError(
                    f"{name}: {what} the shape {list(place.shape)} in {first.path.name}, and {list(shape)} by its "
                    "config: give the config and the weights of one model, and all of these"
                )
        plans = [place.plan(dtype) for place in stored]
        _refuse_different(plans, checkpoint, name)
        found |= dict.fromkeys(names, plans[0])
    return found


def _same(hf: nn.Module) -> list[list[str]]:
    """The names of all parameters, those of one parameter together."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return list(groups.values())


def _refuse_different(plans: list[Plan], checkpoint: Checkpoint, name: str) -> None:
    """Refuse tied weights that are stored twice and differ: transformers would not tie them."""
    first, *others = plans
    for other in others:
        if not torch.equal(_read(first, checkpoint), _read(other, checkpoint)):
            raise ModelError(
                f"{name} ties {first.name} and {other.name} by its config, and stores different values of them: set "
                "tie_word_embeddings to false in its config"
            )


def _read(plan: Plan, checkpoint: Checkpoint) -> Tensor:
    start = plan.place(0)
    tensor = _memory(start + plan.nbytes)[start:].view(plan.dtype).view(plan.shape)
    read(checkpoint, [(plan, tensor)], lambda size: _memory(size).numpy())
    return tensor


def _memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _fill_buffers(hf: Any, stored: Mapping[str, list[Places]], checkpoint: Checkpoint, name: str) -> None:
    """Give every buffer its values: stored ones, or those that its module computes, as when transformers loads.

    They are computed twice, from different memory; one that then differs is not computed at all.
    """
    places = [
        (module, path, own)
        for path, module in hf.named_modules()
        for own, b in module._buffers.items()
        if b is not None
    ]
    runs = []
    for fill in (0, 1):
        for module, _, own in places:
            module._buffers[own] = torch.full_like(module._buffers[own], fill, device="cpu")
        for module in hf.modules():
            vars(module).pop("_is_hf_initialized", None)
        with torch.random.fork_rng(devices=[]):
            hf.initialize_weights()
        runs.append([module._buffers[own] for module, _, own in places])
    kept = hf.state_dict().keys()
    for (module, path, own), first, second in zip(places, *runs, strict=True):
        key = f"{path}.{own}".strip(".")
        if key in kept and key in stored and stored[key][0].shape == second.shape:
            module._buffers[own] = _read(stored[key][0].plan(second.dtype), checkpoint)
        elif key in kept or not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise ModelError(f"{name}: nothing gives the buffer {key} its values: load it without stream")


def _attach_layers(
    layers: tuple[nn.Module, ...],
    paths: list[str],
    plans: Mapping[str, Plan],
    checkpoint: Checkpoint,
    name: str,
) -> LayerReader:
    """Let the layers read their weights when they run."""
    if not layers:
        raise ModelError(f"{name} has no list of decoder layers: load it without stream")
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for path, layer in zip(paths, layers, strict=True):
        for own, parameter in layer.named_parameters(remove_duplicate=False):
            owners[id(parameter)].add(f"{path}.{own}")
    shared = next((sorted(names) for names in owners.values() if len(names) > 1), None)
    if shared is not None:
        raise ModelError(f"{name}: its layers share the weight {shared[0]}: load it without stream")
    own_plans = [
        {own: plans[f"{path}.{own}"] for own, _ in layer.named_parameters()}
        for path, layer in zip(paths, layers, strict=True)
    ]
    reader = LayerReader(checkpoint, own_plans)
    for index, layer in enumerate(layers):
        empty = {own: OnDisk(place.detach(), requires_grad=False) for own, place in layer.named_parameters()}
        attach(layer, LayerOnDisk(reader, index, empty))
    return reader


def _load_rest(hf: nn.Module, plans: Mapping[str, Plan], checkpoint: Checkpoint) -> None:
    """Read the weights outside the layers."""
    for names in _same(hf):
        if isinstance(hf.get_parameter(names[0]), OnDisk):
            continue
        weight = nn.Parameter(_read(plans[names[0]], checkpoint))
        for name in names:
            path, _, own = name.rpartition(".")
            hf.get_submodule(path)._parameters[own] = weight


def _refuse_empty(hf: nn.Module, name: str) -> None:
    """Refuse a model in which any tensor outside the layers' weights has no values, registered or not."""
    for path, module in hf.named_modules():
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for own, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_meta and not isinstance(tensor, OnDisk):
                raise ModelError(
                    f"{name}: {f'{path}.{own}'.strip('.')} has no values, because no file and no module gives it any: "
                    "load it without stream"
                )


def _refuse_non_finite(layers: tuple[nn.Module, ...], paths: list[str], name: str) -> None:
    """Refuse NaN and infinite weights; from the last layer to the first, with which a prompt begins."""
    for path, layer in reversed(list(zip(paths, layers, strict=True))):
        with weights_of(layer):
            broken = [f"{path}.{own}" for own in non_finite(layer)]
        refuse_non_finite(broken, name)
