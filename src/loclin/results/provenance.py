"""The provenance of a result: model, prompt, map, and the versions it was computed with."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

import torch

from loclin.common.brief import brief
from loclin.common.versions import versions_of
from loclin.models.hashing import hash_tensors, tensor_bytes
from loclin.models.model import Model, ModelInfo


@dataclass(frozen=True)
class Provenance:
    """The map that a result comes from, and the versions it was computed with.

    Attributes
    ----------
    model: name, family, revision and source of the model.
    token_ids, tokens, text: the whole prompt: its ids, the text of each token, and of all together (`Model.decode`).
    gate, precision, dtype: the gate split (`"ordinary"`: nothing was frozen), the precision, the dtype of the sweeps.
        A precision that was asked for as `"split"` is `"single"` where products were not split.
    source, target, position, normed: start and end of the map, as in `Linearization.jacobian`.
    positions: the source positions whose maps are in the result: all, or one.
    versions: those of loclin, torch, transformers and Python.
    certificate: the errors of the map's certificate and whether it passed; None if there was no certificate yet.
    date: the time of the computation, in UTC.
    split: for `precision="split"`, what was decided, and why.
    inputs: of what the model was given beside tokens (images, sound, vectors), the hash of each, by name.
    """

    model: ModelInfo
    token_ids: list[int]
    tokens: list[str]
    text: str
    gate: str
    precision: str
    dtype: str
    source: str
    target: str
    position: int
    normed: bool
    positions: list[int]
    versions: dict[str, str]
    certificate: dict[str, Any] | None
    date: str
    split: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    __repr__ = brief

    @classmethod
    def of(
        cls,
        model: Model,
        token_ids: list[int],
        *,
        gate: str,
        precision: str,
        dtype: torch.dtype,
        source: str,
        target: str,
        position: int,
        normed: bool = False,
        positions: list[int] | None = None,
        certificate: dict[str, Any] | None = None,
        split: str | None = None,
    ) -> Provenance:
        """Describe a map at a prompt, with the current versions and time; `positions` are all positions by default."""
        return cls(
            model=model.info,
            token_ids=token_ids,
            tokens=model.decode_each(token_ids),
            text=model.decode(token_ids),
            gate=gate,
            precision=precision,
            dtype=str(dtype).removeprefix("torch."),
            source=source,
            target=target,
            position=position,
            normed=normed,
            positions=list(range(len(token_ids))) if positions is None else positions,
            versions=versions(),
            certificate=certificate,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            split=split,
            inputs={name: hash_tensors([(name, value)], tensor_bytes) for name, value in model.inputs.items()},
        )

    def key(self) -> dict[str, Any]:
        """Return the fields that determine the numbers: all except versions, certificate, date and `split`."""
        left_out = ("versions", "certificate", "date", "split", *([] if self.inputs else ["inputs"]))
        names = [field.name for field in fields(self) if field.name not in left_out]
        return {name: getattr(self, name) for name in names} | {"model": self.model.to_dict()}


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return versions_of("loclin", "torch", "transformers") | {"python": platform.python_version()}
