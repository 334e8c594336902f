"""A model without its weights: its modules on the meta device, built from its config alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from loclin.errors import ModelError, first_line
from loclin.models import hub
from loclin.models.checks import refuse_config, refuse_unknown_family
from loclin.models.gguf import cache
from loclin.models.gguf.packaged import PACKAGED
from loclin.models.options import parse_dtype
from loclin.models.pretrained import config_dtype, read_config
from loclin.models.quiet import quiet
from loclin.models.task import auto_class

_LOCAL = {"local_files_only": True}


def read_model_config(name: str, config_file: Path | None = None, revision: str | None = None) -> PreTrainedConfig:
    """Read the config of what `load` takes: a packaged model, a directory, a GGUF file, a hub id; or a `config.json`.

    Raises ModelError when it cannot be found or read, or is that of no causal decoder.
    """
    path = Path(name).expanduser()
    if config_file is not None:
        if not config_file.is_file():
            raise ModelError(f"there is no file {config_file}: give the model's config.json with --config-file")
        return read_config(str(config_file), str(config_file), _LOCAL)
    if name in PACKAGED:
        copy = cache.place(PACKAGED[name].source())
        if (copy / "config.json").is_file():
            return read_config(str(copy), name, _LOCAL)
        with TemporaryDirectory() as scratch:
            return _read_gguf(PACKAGED[name].source().place(Path(scratch)), name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the directory {name} has no config.json; name one with --config-file")
        return read_config(str(path), name, _LOCAL)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _read_gguf(path, name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no model {name!r}: give a packaged model ({', '.join(PACKAGED)}), a directory, a .gguf file or "
            "a hub id; or its config.json with --config-file"
        )
    try:
        return read_config(name, name, hub.resolve_revision(name, revision, None))
    except ModelError as fault:
        raise ModelError(f"{first_line(fault)}; or give its config.json with --config-file") from fault


def _read_gguf(path: Path, name: str) -> PreTrainedConfig:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as fault:  # the libraries raise anything at all on a file they do not like
        raise ModelError(f"cannot read the header of {name}: {first_line(fault)}") from fault
    refuse_config(config, name)
    refuse_unknown_family(config, name)
    return config


def build_empty(config: PreTrainedConfig, name: str, dtype: str | torch.dtype = "float32") -> PreTrainedModel:
    """Build a model in eval mode whose parameters are on the meta device. Cost: milliseconds a layer, no weights."""
    chosen: Any = parse_dtype(dtype)
    if chosen == "auto":
        chosen = getattr(torch, config_dtype(config) or "float32")
    try:
        with quiet(), torch.device("meta"):
            model: Any = auto_class(config, "causal").from_config(config, dtype=chosen)
    except Exception as fault:  # as many kinds as there are families
        raise ModelError(f"cannot build {name} from its config: {first_line(fault)}") from fault
    found: PreTrainedModel = model.eval()
    return found
