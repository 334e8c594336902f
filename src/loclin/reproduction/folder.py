"""The folder of a reproduction: one run at a time, made by one model with one set of options, resumed target by target.

`run.json` says what it is of. `sources/` has the analyses that targets share. Each target has its files, and
`targets/NAME.json`, which is written last: a target without it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from loclin.common.access import reason
from loclin.errors import OutputError, ResultError
from loclin.models.hashing import sha256
from loclin.reproduction.result import Target
from loclin.results.files import check_writable, read_text, write_text
from loclin.results.result import Result
from loclin.results.serialise import from_plain, to_plain

R = TypeVar("R", bound=Result)

FORMAT = "loclin reproduce 1"
_RUN, _LOCK, _SOURCES, _TARGETS = "run.json", ".lock", "sources", "targets"


class Folder:
    """A folder that is open for one run.

    `asked` is what determines every number: model, options and versions. A folder of another run is refused.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self._asked = path, dict(asked)

    @classmethod
    @contextmanager
    def opened(cls, path: Path, asked: Mapping[str, Any], *, fresh: bool) -> Iterator[Folder]:
        """Open a folder, or make it; nobody else can until the block ends.

        `fresh`: remove what an earlier run has written there, and nothing else. Raises OutputError for a folder that
        cannot be written, is in use, has files of something else, or a run of something else.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {path}: {reason(error, path)}; choose another") from error
        check_writable(path / _RUN)
        folder = cls(path, asked)
        folder._refuse_foreign()
        lock = FileLock(path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"the folder {path} is in use by another run: wait until it ends, or choose another folder"
            ) from None
        try:
            folder._begin(fresh)
            yield folder
        finally:
            lock.release()

    def match(self, weights: Mapping[str, Any]) -> None:
        """Refuse a folder whose run was of other weights, once they are loaded; claim a new one for this run."""
        known = self._read_run()
        if not known:
            write_text(self.path / _RUN, _to_json({"format": FORMAT, "asked": self._asked, "weights": weights}))
        elif known.get("weights") != to_plain(weights):
            self._refuse_stale({"weights": known.get("weights")}, {"weights": weights})

    def source(self, name: str, kind: type[R]) -> R | None:
        """Load an analysis that an earlier run has made; None if there is none, or it is damaged."""
        path = self.path / _SOURCES / f"{name}.json"
        try:
            return kind.load(path) if path.is_file() else None
        except ResultError:
            return None

    def keep(self, name: str, result: Result) -> None:
        """Keep an analysis."""
        (self.path / _SOURCES).mkdir(exist_ok=True)
        result.save(self.path / _SOURCES / f"{name}.json")

    def finished(self, name: str, as_published: bool) -> Target | None:
        """A target that is finished: its record is there, and its files are as they were written."""
        path = self.path / _TARGETS / f"{name}.json"
        if not path.is_file():
            return None
        try:
            found = from_plain(json.loads(read_text(path)), Target)
        except (ResultError, ValueError):
            return None
        whole = all(
            (self.path / file).is_file() and sha256(self.path / file) == digest for file, digest in found.files.items()
        )
        return found if whole and found.as_published == as_published else None

    def finish(self, target: Target) -> None:
        """Record a target whose files are written."""
        (self.path / _TARGETS).mkdir(exist_ok=True)
        write_text(self.path / _TARGETS / f"{target.name}.json", _to_json(target))

    def _begin(self, fresh: bool) -> None:
        if fresh:
            self._clear()
        known = self._read_run()
        if known and known["asked"] != to_plain(self._asked):
            self._refuse_stale(known["asked"], self._asked)

    def _read_run(self) -> dict[str, Any]:
        path = self.path / _RUN
        if not path.is_file():
            return {}
        try:
            found = json.loads(read_text(path))
            return found if isinstance(found, dict) and found.get("format") == FORMAT and "asked" in found else {}
        except (ResultError, ValueError):
            return {}

    def _refuse_foreign(self) -> None:
        """Refuse a folder that has files, but not those of a reproduction."""
        inside = sorted(one.name for one in self.path.iterdir() if not one.name.startswith("."))
        if inside and not self._read_run():
            named = ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
            raise OutputError(
                f"the folder {self.path} holds something else ({named}): choose an empty folder, or one of an earlier "
                "loclin reproduce"
            )

    def _refuse_stale(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        here = to_plain(here)
        differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        told = "; ".join(
            f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here" for name in differing
        )
        raise OutputError(
            f"the folder {self.path} holds another run ({told}): choose another folder, or write over it with --fresh "
            "(fresh=True)"
        )

    def _clear(self) -> None:
        """Remove the files of an earlier run: those that its records name, and no others."""
        if not self._read_run():
            return
        records = sorted((self.path / _TARGETS).glob("*.json"))
        files = [self.path / name for name in ("index.html", "results.json", _RUN)]
        for record in records:
            try:
                files += [self.path / name for name in json.loads(read_text(record))["files"]]
            except (ResultError, ValueError, KeyError):
                continue  # a damaged record: its files are written over
        files += [*records, *(self.path / _SOURCES).glob("*.json")]
        for file in files:
            if file.resolve().is_relative_to(self.path.resolve()):
                file.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _to_json(value: Any) -> str:
    return json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
