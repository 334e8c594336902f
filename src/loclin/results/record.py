"""A result in a JSON file that grows during a long run, and from which an interrupted run is resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, TypeVar

from loclin.common.access import reason
from loclin.errors import OutputError, ResultError
from loclin.results.files import read_text, write_text
from loclin.results.result import Result

R = TypeVar("R", bound=Result)


class Record(Generic[R]):
    """The file of a long run, whose result is a `kind`. Without a path nothing is written; `fresh`: overwrite it."""

    def __init__(self, path: str | os.PathLike[str] | None, kind: type[R], fresh: bool) -> None:
        self.path = None if path is None else Path(path)
        self._kind, self._fresh = kind, fresh

    def read(self) -> R | None:
        """Read the result of an earlier run; None if there is nothing to resume.

        Raises OutputError when the file cannot be read or holds something else; the file is not changed.
        """
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

    def write(self, result: R) -> None:
        """Write the result so far, completely or not at all."""
        if self.path is not None:
            write_text(self.path, result.to_json())
