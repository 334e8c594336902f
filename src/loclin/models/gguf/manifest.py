"""The manifest of a cached copy: which files it must have, byte for byte, and where they came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loclin.common.brief import brief
from loclin.models.hashing import sha256

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What was written, when, and from what."""

    name: str
    source: str
    source_sha256: str
    stored_dtype: str
    created: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    format: int = FORMAT

    __repr__ = brief

    def faults(self, directory: Path, *, content: bool = True) -> list[str]:
        """List the files that are not as they were written: missing, added, of another size or content.

        Cost: with `content`, one read of all of them.
        """
        present = {path.name for path in directory.iterdir()} - {FILE}
        wrong = present ^ self.files.keys()
        by_size = sorted(self.files, key=lambda name: -self.files[name]["size"])  # the long work starts first
        for name in (name for name in by_size if name in present):
            expected = self.files[name]
            path = directory / name
            if path.stat().st_size != expected["size"] or (content and sha256(path) != expected["sha256"]):
                wrong.add(name)
        return sorted(wrong)


def write(directory: Path, *, name: str, source: str, source_sha256: str, stored_dtype: str) -> None:
    """Describe the files of a directory in its manifest. Cost: one read of all of them."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())}
    manifest = Manifest(
        name=name,
        source=source,
        source_sha256=source_sha256,
        stored_dtype=stored_dtype,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={package: _version(package) for package in ("loclin", "torch", "transformers", "gguf")},
        files=files,
    )
    (directory / FILE).write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")


def read(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None when it is missing, damaged, or of another format.

    Raises
    ------
    PermissionError
        When this user may not read it.
    """
    try:
        fields = json.loads((directory / FILE).read_text(encoding="utf-8"))
        manifest = Manifest(**fields)
        sound = manifest.format == FORMAT and all(
            isinstance(file["size"], int) and isinstance(file["sha256"], str) for file in manifest.files.values()
        )
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return manifest if sound else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
