"""The differences between two results of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.results.provenance import Provenance
from loclin.results.result import Result


@dataclass(frozen=True)
class Comparison(Result):
    """The differences between two results; made by `loclin.compare`.

    Attributes
    ----------
    kind: the class of both results.
    differences: fields of the provenance that differ, without dates and certificates: both values, by field.
    errors: |a - b| / |b| of every tensor, and of all numbers of a field together (`tokens.share`); 0 if they are equal.
    """

    kind: str
    differences: dict[str, tuple[Any, Any]]
    errors: dict[str, float]
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per field: its name and its relative error."""
        return {"field": list(self.errors), "error": list(self.errors.values())}


@in_plain_torch
def compare(a: Result, b: Result) -> Comparison:
    """Compare two results, such as a new run and a saved one; OptionError where `a` and `b` differ in kind or shape."""
    if type(a) is not type(b):
        raise OptionError(f"a {type(a).__name__} and a {type(b).__name__} cannot be compared: give two of one kind")
    mine, other = _collect_numbers(a), _collect_numbers(b)
    first, second = (
        {} if one is None else one.key() | {"versions": one.versions} for one in (a.provenance, b.provenance)
    )
    names = dict.fromkeys([*first, *second])
    differing = {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}
    errors = {}
    for name in dict.fromkeys([*mine, *other]):
        one, two = mine.get(name), other.get(name)
        if one is not None and two is not None and one.shape == two.shape:
            errors[name] = 0.0 if torch.equal(one, two) else ((one - two).norm() / two.norm()).item()
        elif one is not None and two is not None and "." not in name:
            shapes = f"{list(one.shape)} and {list(two.shape)}"
            raise OptionError(f"{name} has the shapes {shapes}: compare maps of one shape, with the same k")
        else:  # only one of them has this field, or it has more numbers
            differing[name] = (_count(one), _count(two))
    return Comparison(type(a).__name__, differing, errors)


def _collect_numbers(result: Result) -> dict[str, Tensor]:
    """Collect every tensor, and all floats of each field at any depth, by name."""
    tensors: dict[str, list[Tensor]] = {}
    floats: dict[str, list[float]] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.setdefault(name, []).append(value.cpu().double())
        elif isinstance(value, float):
            floats.setdefault(name, []).append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(name, item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                collect(f"{name}.{key}", item)
        elif is_dataclass(value) and not isinstance(value, Provenance):
            for part in fields(value):
                if not part.metadata.get("saved"):
                    collect(f"{name}.{part.name}" if name else part.name, getattr(value, part.name))

    collect("", result)
    found = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in tensors.items()}
    return found | {name: torch.tensor(values, dtype=torch.float64) for name, values in floats.items()}


def _count(values: Tensor | None) -> str:
    return "nothing" if values is None else f"{values.numel()} numbers"
