"""Checks that a steering is used with the model it was made with."""

from __future__ import annotations

from typing import Any

from torch import nn

from loclin.errors import SteeringError
from loclin.models import Model
from loclin.models.hashing import hash_tensors
from loclin.models.lease import named_weights
from loclin.models.snapshot import samples

_NAMED = ("name", "family", "revision", "sha256", "dtype", "n_parameters")


def fingerprint(module: nn.Module) -> str:
    """Hash 64 numbers of every weight that is in memory: other revisions, dtypes and fine-tunes have other hashes."""
    return hash_tensors(named_weights(module), lambda weight: samples([weight])[0])


def check_model(what: str, made_with: dict[str, Any], weights: str, model: Model) -> None:
    """Refuse a model whose weights differ from those that something was made with, and say how they differ."""
    if fingerprint(model.hf) == weights:
        return
    here = model.info.to_dict()
    differing = [f"{k} {made_with.get(k)!r} there, {here[k]!r} here" for k in _NAMED if made_with.get(k) != here[k]]
    why = "; ".join(differing) or "the same name, but other weights: another revision, a fine-tune or an adapter"
    raise SteeringError(f"the {what} was made with another model ({why}); make it again with this one")
