"""PEFT adapters, put on a model while it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loclin.errors import ModelError, first_line
from loclin.models.model import Model


def put_adapter(model: Model, adapter: str | Path | None) -> Model:
    """Put an adapter, if there is one, on a model's own weights, in place; the model's name says so.

    ModelError for a directory without an adapter, or an adapter that does not fit.
    """
    if adapter is None:
        return model
    directory = Path(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"adapter {directory}: there is no adapter_config.json in it; give the directory that save_pretrained wrote"
        )
    try:
        model.hf.load_adapter(str(directory))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"adapter {directory} does not fit {model.info.name}: {first_line(fault)}") from fault
    model.hf.eval()
    return replace(model, info=replace(model.info, name=f"{model.info.name} + {directory.name}"))
