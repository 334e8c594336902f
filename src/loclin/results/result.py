"""The base class of all results: saving, loading, exporting and showing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor

from loclin.common.access import reason
from loclin.common.brief import brief
from loclin.errors import OutputError, ResultError
from loclin.results import display
from loclin.results.files import read_text, write_text
from loclin.results.provenance import Provenance
from loclin.results.serialise import from_plain, to_plain
from loclin.results.table import dataframe
from loclin.results.tensor_file import load_tensors, save_tensors

if TYPE_CHECKING:
    from pandas import DataFrame

R = TypeVar("R", bound="Result")


class Result:
    """The base class of results, which are dataclasses.

    Attributes
    ----------
    provenance: model, prompt and map, and the versions it was computed with; None if it is not about one map.
    warnings: what a reader should know before trusting it.
    """

    provenance: Provenance | None
    warnings: list[str]

    derived: ClassVar[tuple[str, ...]] = ()
    """Properties that `to_dict` adds to the fields."""

    def __init_subclass__(cls) -> None:
        if "__repr__" not in vars(cls):  # else `dataclass` would write one with every number
            cls.__repr__ = brief  # type: ignore[method-assign]

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain values: the name of the class as `result`, every field, and derived properties.

        A tensor becomes its dtype, its shape and its numbers as nested lists, a number that is not finite a text.
        Fields that are marked as too large are left out.
        """
        return {"result": type(self).__name__, **to_plain(self)}

    def to_json(self) -> str:
        """Convert it to JSON text, see `to_dict`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls: type[R], values: dict[str, Any]) -> R:
        """Build the result that `to_dict` described; ResultError for another class, or a version with other fields."""
        return cls._from_plain(values, "it")

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Build the result that `to_json` wrote; raises ResultError as `from_dict` does, and for what is not JSON."""
        return cls._from_json(text, "it")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file, completely or not at all.

        At a `path` that ends in `.safetensors` it has every field that can be saved, with tensors bit for bit, and a
        readable description is written to `PATH.json`; `.json` has the text of `to_json`. Raises OutputError when a
        file cannot be written, or for another ending.
        """
        if Path(path).suffix == ".json":
            write_text(path, self.to_json())
            return
        tensors: dict[str, Tensor] = {}

        def store(name: str, tensor: Tensor) -> dict[str, str]:
            tensors[name] = tensor
            return {"tensor": name}

        about = to_plain(self, store)
        save_tensors(path, tensors, {"result": type(self).__name__, **about})

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Load a saved result, with tensors on the CPU; ResultError if it is missing, altered, or something else."""
        if Path(path).suffix == ".json":
            return cls._from_json(read_text(path), str(path))
        tensors, about = load_tensors(path)
        about = {name: {"tensor": name} for name in tensors if "." not in name} | about
        return cls._from_plain(about, str(path), tensors)

    @classmethod
    def _from_json(cls: type[R], text: str, name: str) -> R:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ResultError(f"{name} is not JSON ({error}): give what to_json() wrote") from error
        return cls._from_plain(values, name)

    @classmethod
    def _from_plain(cls: type[R], values: Any, name: str, tensors: dict[str, Tensor] | None = None) -> R:
        kind = values.get("result", "no result") if isinstance(values, dict) else "no result"
        if kind != cls.__name__:
            raise ResultError(f"{name} holds {kind}, not {cls.__name__}: load it with the class that saved it")
        try:
            return from_plain(values, cls, tensors)
        except ResultError as error:
            raise ResultError(
                f"{name} was saved by another version of loclin ({error}): load it with that one, or compute it again"
            ) from error

    def to_dataframe(self) -> DataFrame:
        """Make a table of it; raises MissingExtraError without pandas (`pip install "loclin[pandas]"`)."""
        return dataframe(self.table())

    def table(self) -> dict[str, list[Any]]:
        """Return the columns of `to_dataframe`, of equal length; by default one row of the numbers and texts."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: [value] for name, value in found.items() if isinstance(value, bool | int | float | str)}

    def show(self) -> None:
        """Print it as the command line does."""
        display.show(self)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Render it as a complete HTML page that needs no network, and write that to `path`, if given.

        Raises OutputError when it cannot be written, and MissingExtraError without plotly, which draws the figures.
        """
        text = display.page(self)
        if path is not None:
            write_text(path, text)
        return text

    def _repr_html_(self) -> str:
        return display.fragment(self)


class AtPrompt(Result):
    """The base class of results about one prompt."""

    provenance: Provenance

    derived: ClassVar[tuple[str, ...]] = ("prompt",)

    @property
    def prompt(self) -> str:
        """The prompt as the tokenizer reads it."""
        return self.provenance.text


class Record(Generic[R]):
    """The JSON file of a long run, which grows, and from which an interrupted run is resumed.

    The result is of the class `kind`. Without a path nothing is written; `fresh`: overwrite the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, kind: type[R], fresh: bool) -> None:
        self.path = None if path is None else Path(path)
        self._kind, self._fresh = kind, fresh

    def read(self) -> R | None:
        """Read the result of an earlier run, None if there is none; OutputError for a file with something else."""
        if self.path is None or self._fresh:
            return None
        try:
            return self._kind.from_json(read_text(self.path)) if self.path.is_file() else None
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {reason(error, self.path)}") from error
        except ResultError as error:
            raise OutputError(
                f"cannot resume {self.path}: {error}; or choose another file, or overwrite it with --fresh (fresh=True)"
            ) from error

    def resume(self, new: R, same: Sequence[str], tell: Callable[[str], None], why_not: str) -> R | None:
        """Read an earlier result whose fields `same` are those of the new one; None without one, or told why not."""
        earlier = self.read()
        if earlier is not None and any(getattr(earlier, name) != getattr(new, name) for name in same):
            tell(f"{self.path} was written {why_not}: starting over")
            return None
        return earlier

    def write(self, result: R) -> None:
        """Write the result so far, completely or not at all."""
        if self.path is not None:
            write_text(self.path, result.to_json())
