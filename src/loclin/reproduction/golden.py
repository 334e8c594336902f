"""The figures that the paper and its author's public notebooks have, and the models that they are of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Literal

import msgspec

from loclin.common.brief import brief
from loclin.models.model import Model

Kind = Literal[
    "prediction", "error", "s0", "u0", "layer_words", "rank", "own_rank", "path", "table_word", "steered", "normal"
]
Value = str | float | list[float | str]


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: its ids on the hub, and the shape by which a local copy is known."""

    name: str
    ids: list[str]
    family: str
    hidden_size: int
    layers: int
    intermediate_size: int
    vocabulary: int
    gated: bool

    __repr__ = brief

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """Its family and sizes; of the vocabulary, which is often padded, nothing."""
        return self.family, self.hidden_size, self.layers, self.intermediate_size


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes
    ----------
    target: the figure or table of the paper to which it belongs.
    model, dtype, prompt: what it is of; the dtype is "4-bit" for packed weights, and "unknown" where none is said.
    kind, at, value: what it is; `at` is a token, a layer counted from 1, or a layer and a vector counted from 1.
    trust, source: how far it can be trusted (`Golden.trust`), and where it stands.
    """

    target: str
    model: str
    kind: Kind
    value: Value
    dtype: str
    prompt: str
    trust: str
    source: str
    at: int | list[int] | None = None

    __repr__ = brief


@dataclass(frozen=True)
class Setting:
    """One row of the paper's steering table. Layers are counted from 1; the printed layer may differ from the run."""

    model: str
    toward: str
    prompt: str
    layer: int
    layers: int
    printed_layer: int
    printed_layers: int
    strength: float
    tokens: int
    steered: str
    normal: str | None

    __repr__ = brief

    def place(self, n_layers: int) -> int:
        """The layer, counted from 0, at the same relative depth of a model with so many layers."""
        return _place(self.layer / self.layers, n_layers)

    def printed_place(self, n_layers: int) -> int:
        """The same for the layer that the paper prints."""
        return _place(min(1.0, self.printed_layer / self.layers), n_layers)


def _place(depth: float, n_layers: int) -> int:
    return min(max(round(depth * n_layers) - 1, 1), n_layers - 1)


@dataclass(frozen=True)
class Golden:
    """All that is published: where, and how far each kind of figure can be trusted."""

    paper: str
    code: str
    prompt: str
    trust: dict[str, str]
    models: list[PaperModel]
    steering: list[Setting]
    figures: list[Published]
    version: str = ""  # the file's hash

    __repr__ = brief

    def of(self, model: str, target: str) -> list[Published]:
        """The published figures of a model for a figure or table."""
        return [one for one in self.figures if (one.model, one.target) == (model, target)]

    def find(self, name: str) -> PaperModel | None:
        """The paper's model that a name means: a hub id, or the last part of one."""
        wanted = PurePath(name).name.casefold()
        return next((one for one in self.models if wanted in _names(one)), None)


def _names(model: PaperModel) -> set[str]:
    return {model.name.casefold(), *(PurePath(one).name.casefold() for one in model.ids)}


@cache
def read_golden() -> Golden:
    """Read the packaged figures."""
    data = (files("loclin.reproduction") / "golden.json").read_bytes()
    return replace(msgspec.json.decode(data, type=Golden), version=hashlib.sha256(data).hexdigest()[:16])


def recognise(model: Model) -> tuple[PaperModel | None, str]:
    """Find out which of the paper's models a model is, and by what it was recognised.

    A hub model is known by its id alone, since fine-tunes have the same shape. A local copy is known by its directory's
    name, or else by its shape, if just one of the paper's models has it.
    """
    golden = read_golden()
    named = golden.find(model.info.name)
    if named is not None or model.info.source == "hub":
        return named, "its name"
    alike = find_alike(model)
    return (alike[0], "its shape") if len(alike) == 1 else (None, "")


def find_alike(model: Model) -> list[PaperModel]:
    """The paper's models that have a model's shape."""
    config: Any = model.hf.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    shape = (model.info.family, *sizes)
    return [one for one in read_golden().models if one.shape == shape]
