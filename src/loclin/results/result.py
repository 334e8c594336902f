"""Results that know where they came from: saved, loaded, compared."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError, ResultError
from loclin.models.model import ModelInfo
from loclin.results.tensor_file import load_tensors, save_tensors

R = TypeVar("R", bound="Result")
_CIRCUMSTANCES = ("versions", "certificate", "date")
"""What may differ between two computations of the same numbers."""


@dataclass(frozen=True)
class Provenance:
    """Which map a result is of, and what it was computed with.

    Attributes
    ----------
    model
        Name, family, revision and source of the model.
    token_ids, tokens, text
        The prompt, all of it: ids, each one as it is shown, and all together (see `Model.decode`).
    gate, precision, dtype
        What was held (`"ordinary"`: nothing), and the dtype of the sweeps.
    source, target, position, normed
        The map's ends, as in `Linearization.jacobian`.
    positions
        The source positions whose maps are in the result: all, or one token's.
    versions
        Of loclin, torch, transformers and Python.
    certificate
        `Certificate.to_dict()` of the map, where one had been made.
    date
        When, in UTC.
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

    __repr__ = brief

    def key(self) -> dict[str, Any]:
        """What fixes the numbers: everything but versions, certificate and date."""
        return {name: value for name, value in self.to_dict().items() if name not in _CIRCUMSTANCES}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Provenance:
        """The provenance that `to_dict` gave."""
        return cls(**values | {"model": ModelInfo(**values["model"])})


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {name: version(name) for name in ("loclin", "torch", "transformers")} | {"python": platform.python_version()}


class Result:
    """A dataclass of tensors and plain values that can be saved. Its `provenance` may be None."""

    provenance: Provenance | None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a `.safetensors` file, and what it is, to read, to `PATH.json`.

        Raises
        ------
        OutputError
            When the files cannot be written, or the path has another ending.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        if self.provenance is not None:
            plain["provenance"] = self.provenance.to_dict()
        save_tensors(path, tensors, {"result": type(self).__name__} | plain)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a saved result; its tensors are bit for bit those that were saved, on the CPU.

        Raises
        ------
        ResultError
            When the file is missing, altered, or holds something else.
        """
        tensors, about = load_tensors(path)
        kind = about.pop("result", "no result")
        if kind != cls.__name__:
            raise ResultError(f"{path} holds {kind}, not {cls.__name__}; load it with the class that saved it")
        try:
            if about.get("provenance") is not None:
                about["provenance"] = Provenance.from_dict(about["provenance"])
            return cls(**tensors, **about)
        except TypeError as error:  # fields that one version has and another has not
            raise ResultError(f"{path} was saved by another version of loclin ({error}); use that one") from error


@dataclass(frozen=True)
class Comparison:
    """How two results differ.

    Attributes
    ----------
    provenance
        What is not the same about where they came from, dates and certificates aside: both values, by field.
    errors
        |a - b| / |b| of every tensor, by field; 0 where all bits agree.
    """

    provenance: dict[str, tuple[Any, Any]]
    errors: dict[str, float]

    __repr__ = brief


@in_plain_torch
def compare(a: Result, b: Result) -> Comparison:
    """Compare two results of one kind: a rerun with what was saved, one gate split with another.

    Raises
    ------
    OptionError
        When they are of different kinds or shapes, so that their numbers do not correspond.
    """
    if type(a) is not type(b):
        raise OptionError(f"a {type(a).__name__} and a {type(b).__name__} cannot be compared; give two of one kind")
    first, second = (_described(result) for result in (a, b))
    names = dict.fromkeys([*first, *second])
    differing = {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}
    errors = {}
    for field in fields(a):  # type: ignore[arg-type]
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape:
                shapes = f"{list(one.shape)} and {list(other.shape)}"
                raise OptionError(f"{field.name} has the shapes {shapes}: compare maps of one shape, with the same k")
            errors[field.name] = _relative(one, other)
    return Comparison(differing, errors)


def _described(result: Result) -> dict[str, Any]:
    known = result.provenance
    return {} if known is None else known.key() | {"versions": known.versions}


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()
    return 0.0 if torch.equal(a, b) else ((a - b).norm() / b.norm()).item()
