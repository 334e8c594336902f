"""Load a checkpoint in transformers' own format; every failure is one line."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loclin.common import free_memory
from loclin.errors import LoclinError, MissingExtraError, ModelError, OptionError, first_line
from loclin.models import quantisation
from loclin.models.checks import refuse_config, refuse_missing, refuse_unknown_family
from loclin.models.four_bit import keep_from_packing
from loclin.models.hub import describe_gated
from loclin.models.model import Model, Source, describe
from loclin.models.quiet import quiet
from loclin.models.streaming.checkpoint import DTYPES, lost
from loclin.models.task import Task, auto_class, config_task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# arguments of from_pretrained that say where the files are, and so concern the config and the tokenizer too
_WHERE = "cache_dir code_revision force_download local_files_only proxies revision subfolder token trust_remote_code"
_DOWNLOAD = "cache_dir force_download local_files_only proxies revision token"
_STREAMED = "config.json generation_config.json model*.safetensors model.safetensors.index.json"
_TOKENIZER_FILES = """
tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt merges.txt spiece.model tekken.json
"""
_MOST_OF_FREE = 0.9  # the part of the free memory that weights may take: sweeps need some, too


def load_directory(path: Path, name: str, arguments: dict[str, Any], task: Task | None = None) -> Model:
    """Load a model from a local directory."""
    inside = path / arguments.get("subfolder", "")
    if not (inside / "config.json").is_file():
        ggufs = sorted(inside.glob("*.gguf"))
        hint = f"; to load its GGUF file, give {ggufs[0]}" if ggufs else ""
        raise ModelError(f"the directory {name} has no config.json{hint or ': give the directory of a model'}")
    stored = stored_dtype(inside)
    has_tokenizer = any((inside / file).exists() for file in _TOKENIZER_FILES.split())
    return _load(str(path), name, "directory", {**arguments, "local_files_only": True}, task, stored, has_tokenizer)


def load_hub(name: str, arguments: dict[str, Any], task: Task | None = None) -> Model:
    """Load a model from the hub, or from the copy its client has downloaded."""
    return _load(name, name, "hub", arguments, task)


def _load(
    place: str,
    name: str,
    source: Source,
    arguments: dict[str, Any],
    task: Task | None,
    stored: str | None = None,
    tokenized: bool = True,
) -> Model:
    config = read_config(place, name, arguments, task)
    chosen = task or config_task(config)
    settings = quantisation.settings_of(config)
    stored = settings.get("quant_method") or stored or config_dtype(config)
    tokenizer = read_tokenizer(place, name, arguments) if tokenized else None
    read = partial(_read_quantised, config=config, settings=settings) if settings else read_weights
    hf = read(place, name, arguments, chosen)
    about: dict[str, Any] = {"revision": arguments.get("revision"), "stored_dtype": stored}
    return describe(
        hf, tokenizer, name=name, source=source, read_processor=partial(read_processor, place, name, arguments), **about
    )


def _read_quantised(
    place: str, name: str, arguments: dict[str, Any], task: Task, config: PreTrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    """Read a checkpoint whose weights are quantised; those that loclin unpacks are plain ones then."""
    if "quantization_config" not in arguments:
        quantisation.refuse_quantised(settings, name)
        if settings["quant_method"] in quantisation.PACKED and not arguments.get("stream"):
            if task != "causal":
                raise ModelError(f"{name} is a {task} model with packed weights: give a checkpoint with plain weights")
            return _read_packed(place, name, arguments, config, settings)
    hf: Any = read_weights(place, name, quantisation.with_options(settings, arguments), task)
    hf._loclin_note = quantisation.note_dequantised(settings, name)
    return hf


def _read_packed(
    place: str, name: str, arguments: dict[str, Any], config: PreTrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    """Read a GPTQ, AWQ or HQQ checkpoint into a plain model."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from loclin.models.packed import read_packed

    if arguments.get("trust_remote_code") and hasattr(config, "auto_map"):
        raise ModelError(f"{name} brings its own code and packed weights: give a checkpoint with plain weights")
    plain = copy.deepcopy(config)
    del plain.quantization_config
    given = {key: value for key, value in arguments.items() if key not in {*_WHERE.split(), "stream"}}
    with _reading(name, "model"):
        directory = _obtain(place, arguments)
        state = read_packed(directory, settings, name)
        if given["dtype"] == "auto":
            given["dtype"] = getattr(torch, config_dtype(config) or "float32")
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(plain)]
        hf, report = kind.from_pretrained(None, config=plain, state_dict=state, output_loading_info=True, **given)
        if (directory / "generation_config.json").is_file():
            hf.generation_config = GenerationConfig.from_pretrained(directory)
    refuse_missing(report, name)
    hf.name_or_path = config.name_or_path
    return hf.eval()


def read_config(place: str, name: str, arguments: dict[str, Any], task: Task | None = "causal") -> PreTrainedConfig:
    """Read a checkpoint's config, and refuse what is no model of the task before any weight is read."""
    from transformers import AutoConfig

    with _reading(name, "config"):
        config = AutoConfig.from_pretrained(place, **_where(arguments))
    task = task or config_task(config)
    refuse_config(config, name, task)
    refuse_unknown_family(config, name, task)
    return config


def read_tokenizer(place: str, name: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Read a checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    with _reading(name, "tokenizer", "; to do without it, load the model yourself and wrap() it"):
        return AutoTokenizer.from_pretrained(place, **_where(arguments))


def read_processor(place: str, name: str, arguments: dict[str, Any]) -> Any:
    """Read what turns a checkpoint's images into tokens and tensors; None where it has nothing of the kind."""
    from transformers import AutoProcessor, ProcessorMixin

    with _reading(name, "processor of images"):
        try:
            found = AutoProcessor.from_pretrained(place, **_where(arguments))
        except ImportError as fault:
            raise MissingExtraError(f"the processor of images of {name}", "pillow and torchvision", "images") from fault
    return found if isinstance(found, ProcessorMixin) else None


def read_weights(place: str, name: str, arguments: dict[str, Any], task: Task = "causal") -> PreTrainedModel:
    """Read a checkpoint's weights into a model in eval mode; with `stream`, those of its layers stay on disk.

    Where `stream` is None, they do if the weights do not fit into the free memory.
    """
    arguments = {**arguments}
    stream = arguments.pop("stream", False)
    if task != "causal":
        if stream:
            raise OptionError(f"{name} is a {task} model, and stream is for causal ones: leave stream out")
        stream = False
    if stream:
        return _stream_weights(place, name, arguments)
    if stream is None and (why := _too_large(Path(place), arguments)):
        try:
            hf: Any = _stream_weights(place, name, arguments)
        except ModelError as fault:
            raise ModelError(f"{name}: {why}, and cannot stay on disk either ({fault}); stream=False tries") from fault
        hf._loclin_note = f"The layers of {name} are read from disk layer by layer: {why}."
        return hf
    with _reading(name, "model"):
        kind = auto_class(read_config(place, name, arguments, task), task)
        loaded: Any = kind.from_pretrained(place, **{**arguments, "output_loading_info": True})
    hf, report = loaded
    refuse_missing(report, name)
    keep_from_packing(hf)
    return hf.eval()


def _too_large(directory: Path, arguments: dict[str, Any]) -> str | None:
    """Why a directory's weights do not fit into the free memory; None where they do, or are not in safetensors."""
    inside = directory / arguments.get("subfolder", "")
    if not inside.is_dir() or quantisation.settings_of(read_config(str(directory), str(directory), arguments)):
        return None
    dtype = arguments["dtype"]
    needed = sum(
        count * (dtype if isinstance(dtype, torch.dtype) else DTYPES.get(kind, torch.int8)).itemsize
        for kind, count in stored_elements(inside).items()
    )
    free = free_memory.available(torch.device("cpu"))
    if needed <= _MOST_OF_FREE * free:
        return None
    return f"its weights take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free"


def _stream_weights(place: str, name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """Build a model whose layers read their weights when they run."""
    from loclin.models.streaming.build import build
    from loclin.models.streaming.quantised import refuse_unknown

    known = {*_WHERE.split(), "dtype", "attn_implementation"}
    config = read_config(place, name, arguments)
    if settings := quantisation.settings_of(config):
        refuse_unknown(settings, name)
    if arguments.get("trust_remote_code") and hasattr(config, "auto_map"):
        raise ModelError(f"{name} brings its own code, and stream takes transformers' families: load it without stream")
    for option in arguments.keys() - known:
        raise OptionError(f"{option} and stream are both given: leave one out")
    with _reading(name, "model"):
        directory = _obtain(place, arguments)
        dtype = arguments["dtype"]
        if dtype == "auto":
            dtype = getattr(torch, config_dtype(config) or stored_dtype(directory) or "float32")
        return build(config, directory, name, dtype, arguments.get("attn_implementation"))


def _obtain(place: str, arguments: dict[str, Any]) -> Path:
    """The directory with a model's safetensors files, downloaded if it is on the hub."""
    from huggingface_hub import snapshot_download

    directory, inside = Path(place), arguments.get("subfolder", "")
    if not directory.is_dir():
        where = {key: arguments[key] for key in _DOWNLOAD.split() if key in arguments}
        wanted = [f"{inside}/{file}".strip("/") for file in _STREAMED.split()]
        directory = Path(snapshot_download(place, allow_patterns=wanted, **where))
    return directory / inside


@contextmanager
def _reading(name: str, what: str, hint: str = "") -> Iterator[None]:
    """Silence the libraries, and make one line of each of their failures."""
    try:
        with quiet():
            yield
    except LoclinError:
        raise
    except Exception as fault:  # many kinds, from JSON to the hub
        raise ModelError(f"{describe_failure(name, what, fault)}{hint}") from fault


def describe_failure(name: str, what: str, fault: Exception) -> str:
    """One line for why a checkpoint's config, tokenizer or weights cannot be read."""
    causes = [fault, fault.__cause__, fault.__context__]
    kinds = {kind.__name__ for cause in causes if cause is not None for kind in type(cause).__mro__}
    if "GatedRepoError" in kinds or "gated repo" in str(fault):
        return describe_gated(name)
    if "SafetensorError" in kinds:
        return f"the weights of {name} are cut off or damaged ({first_line(fault)}): get them again"
    return f"cannot read the {what} of {name}: {first_line(fault)}"


def stored_dtype(directory: Path) -> str | None:
    """The dtype that most weights of a directory are stored in, from its safetensors headers; None without any."""
    elements = stored_elements(directory)
    if not elements:
        return None
    kind = elements.most_common(1)[0][0]
    return str(DTYPES.get(kind, kind)).removeprefix("torch.")


def stored_elements(directory: Path) -> Counter[str]:
    """How many numbers a directory's safetensors files hold in each dtype, by its name there. Cost: their headers."""
    from safetensors import SafetensorError, safe_open

    elements: Counter[str] = Counter()
    for path in sorted(directory.glob("*.safetensors")):
        try:
            path.open("rb").close()  # `safe_open` says of a file without permission that it does not exist
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is not a dictionary)
                    tensor = file.get_slice(name)
                    elements[tensor.get_dtype()] += prod(tensor.get_shape())
        except SafetensorError as fault:
            raise ModelError(f"{path} is cut off or damaged ({first_line(fault)}){lost(path)}: get it again") from fault
    return elements


def config_dtype(config: PreTrainedConfig) -> str | None:
    """Name the dtype a config says its weights are stored in."""
    dtype = config.dtype or config.get_text_config().dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _where(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in _WHERE.split() if key in arguments}
