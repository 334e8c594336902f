"""`load`: a model from the name of a packaged model, a hub id, a directory or a GGUF file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loclin.common import access
from loclin.common.surroundings import in_plain_torch
from loclin.errors import ModelError, OptionError
from loclin.models import hub, pretrained
from loclin.models.adapter import put_adapter
from loclin.models.four_bit import four_bits
from loclin.models.gguf import converted
from loclin.models.gguf.packaged import DEFAULT, PACKAGED
from loclin.models.gguf.source import gguf_file
from loclin.models.model import Model
from loclin.models.options import parse_device, parse_devices, parse_dtype, require
from loclin.models.spread import put
from loclin.models.task import TASKS, Task


@in_plain_torch
def load(
    name: str | Path = DEFAULT,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    devices: str | Sequence[str | torch.device] | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    stream: bool | None = None,
    task: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Model:
    """Load a language model, or a sequence classifier.

    Parameters
    ----------
    name
        A packaged model ("gemma-3-270m", "smollm2-135m"), a local directory, a `.gguf` file, or a hub id "org/name".
    dtype
        "float32" (the default: exactness is the point), "float64", "bfloat16", "float16", or "auto" for the type the
        weights are stored in.
    device
        "cpu", "cuda:0", … ; by default the processor.
    devices
        Several devices that share the work: "all", or names such as "cuda:0,cuda:1" or a list of them. The model is put
        on the first, or its layers on all where it does not fit (which needs accelerate), or where `device_map` says.
        Every device takes a part of each layer's columns and positions, with a copy of the layer's weights, which it
        keeps while it has 4 GiB free. Results are the same bits as those of one such device. `memory=` of a prompt is
        for each device. "cpu,cpu" runs the same code on the processor, and is no faster.
    device_map, quantization_config, attn_implementation
        As in transformers. A device map needs accelerate; kernels from the hub are refused.
    revision
        A hub model's branch, tag or commit.
    quantization
        "nf4" or "fp4": quantise the weights to four bits while loading, with bitsandbytes; short for a
        `quantization_config`.
    adapter
        A PEFT adapter (LoRA, ...) to put on the model: its directory. The map is that of the model with the adapter.
    stream
        Leave the decoder layers' weights on disk, and read each layer when it is used, for models larger than memory.
        Maps are the same bits; `svd(joint=True)` may take another method, within the same bounds. In memory are two
        layers, the embeddings and the head. For safetensors files of transformers' own families, on the processor; the
        files must stay as they are. By default this is done where the weights of a local model do not fit into the
        free memory, and every result says so; False never does it.
    task
        "causal", "masked", "classification" or "seq2seq": what the model predicts, and so its class. By default that of
        the class that the checkpoint was stored from.
    **from_pretrained_kwargs
        Anything else that transformers' `from_pretrained` takes.

    Returns
    -------
    Model
        In eval mode. Cost: a GGUF model is converted once (30 to 120 s), then read from the cache in seconds.

    Raises
    ------
    ModelError
        When the model cannot be found, read or used, or is neither fit for memory nor for streaming.
    OptionError
        For an option without a meaning, or one that `stream` excludes.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise ModelError(
            f"{name!r} is not the name of a model: give a packaged model, a hub id, a directory or a GGUF file"
        )
    chosen = parse_dtype(dtype)
    quantization_config = _quantised(quantization, quantization_config, chosen)
    stream = _in_memory(adapter, stream)
    where = None if device is None else parse_device(device)
    excluded = {"device": device, "quantization_config": quantization_config, "stream": stream or None}
    shared = () if devices is None else _shared(devices, excluded)
    if device_map is not None:
        if where is not None:
            raise ModelError("device and device_map are both given: give one of them")
        require("accelerate", "device_map", "accelerate")
    if from_pretrained_kwargs.pop("use_kernels", False) or "/" in (attn_implementation or ""):
        raise ModelError("kernels from the hub hide the operations of the model: load it without them")
    arguments: dict[str, Any] = {
        "device_map": device_map,
        "quantization_config": quantization_config,
        "attn_implementation": attn_implementation,
    }
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments |= {"dtype": chosen, **from_pretrained_kwargs}
    if stream:
        _refuse_elsewhere(where, arguments)
    if stream is None and (from_pretrained_kwargs or shared or _elsewhere(where, arguments)):
        stream = False
    arguments["stream"] = stream
    if task is not None and task not in TASKS:
        raise OptionError(f"task={task!r}: choose one of {', '.join(TASKS)}")
    try:
        model = _load(name, revision, arguments, task)
    except PermissionError as fault:
        raise ModelError(
            f"cannot read {name}: {access.reason(fault, Path(name))}; chmod it, or copy it to where you can read it"
        ) from fault
    if where is not None and not model.streamed:
        hf: torch.nn.Module = model.hf  # transformers' own `to` has no types
        hf.to(where)
    model = put_adapter(model, adapter)
    if shared and device_map is None:
        put(model.hf, shared, model.info.name)
    return model.shared_by(shared) if shared else model


def _quantised(kind: str | None, config: Any, dtype: torch.dtype | str) -> Any:
    """The `quantization_config` that one of two options asks for."""
    if kind is not None and config is not None:
        raise OptionError("quantization and quantization_config are both given: give one of them")
    return config if kind is None else four_bits(kind, dtype)


def _in_memory(adapter: str | Path | None, stream: bool | None) -> bool | None:
    """Where the weights are to be: in memory, if an adapter is put on them."""
    if adapter is None:
        return stream
    require("peft", "an adapter", "adapters")
    if stream:
        raise OptionError("an adapter is put on weights in memory: leave stream out")
    return False


def _shared(devices: str | Sequence[str | torch.device], excluded: dict[str, Any]) -> tuple[torch.device, ...]:
    """The devices that share a model's work, without another option that says where its weights are."""
    for name, given in excluded.items():
        if given is not None:
            raise OptionError(f"devices and {name}={given!r} are both given: give one of them")
    return parse_devices(devices)


def _elsewhere(where: torch.device | None, arguments: dict[str, Any]) -> list[str]:
    """The options that exclude weights that stay on disk."""
    given: list[str] = [option for option in ("device_map", "quantization_config") if option in arguments]
    return given + ([f"device={str(where)!r}"] if where is not None and where.type != "cpu" else [])


def _refuse_elsewhere(where: torch.device | None, arguments: dict[str, Any]) -> None:
    """Refuse what excludes weights that stay on disk."""
    if given := _elsewhere(where, arguments):
        raise OptionError(f"{given[0]} and stream=True are both given: stream reads plain weights for the processor")


def _load(name: str | Path, revision: str | None, arguments: dict[str, Any], task: Task | None) -> Model:
    label = str(name)
    try:
        path = Path(name).expanduser()
    except RuntimeError as fault:  # the home of a user that there is not
        raise ModelError(f"there is no directory {label}: {fault}") from fault
    packaged = PACKAGED.get(label)
    on_disk = packaged is not None or path.exists() or path.suffix.lower() == ".gguf"
    if on_disk and revision is not None:
        raise ModelError(f"{label} is not a hub model: leave revision out")
    is_gguf = packaged is not None or (path.suffix.lower() == ".gguf" and not path.is_dir())
    if is_gguf and task not in (None, "causal"):
        raise ModelError(f"{label} is a GGUF file, which holds a causal model: leave the task out")
    if packaged is not None:
        return converted.load(packaged.source(), label, "package", arguments, bos_token=packaged.bos)
    if path.is_dir():
        return pretrained.load_directory(path, label, arguments, task)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {label}: check the path")
        return converted.load(gguf_file(path), label, "gguf", arguments)
    if path.is_file():
        raise ModelError(f"{label} is not a .gguf file; give the directory that holds the model")
    if "/" not in label:
        near = difflib.get_close_matches(label.lower(), PACKAGED, n=2, cutoff=0.4)
        guess = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ModelError(
            f"there is no model {label!r}{guess}: give a packaged model ({', '.join(PACKAGED)}), a directory, a .gguf "
            "file, or a hub id such as org/name"
        )
    if label.count("/") > 1 or label.startswith((".", "/", "~")):
        raise ModelError(f"there is no directory {label}: check the path")
    found = hub.resolve_revision(label, revision, arguments.get("token"), arguments.get("cache_dir"))
    return pretrained.load_hub(label, {**arguments, **found}, task)
