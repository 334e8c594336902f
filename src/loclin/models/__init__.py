"""Bring me a model: from a package, a hub, a directory, a GGUF file, or your own hands."""

from loclin.models.loading import load
from loclin.models.model import Model, ModelInfo, wrap

__all__ = ["Model", "ModelInfo", "load", "wrap"]
