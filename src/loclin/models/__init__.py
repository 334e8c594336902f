"""Models: from a package, the hub, a directory, a GGUF file, or loaded by the user."""

from loclin.models.loading import load
from loclin.models.model import Model, ModelInfo, wrap

__all__ = ["Model", "ModelInfo", "load", "wrap"]
