"""The manifest of a cached copy: which files it must have, byte for byte, and where they came from."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import msgspec

from loclin.common.versions import versions_of
from loclin.models.hashing import BLOCK, sha256

FILE = "manifest.json"
FORMAT = 1


class File(msgspec.Struct, frozen=True):
    """One file of a copy."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was written, when, and from what."""

    name: str
    source: str
    source_sha256: str
    stored_dtype: str
    created: str
    versions: dict[str, str]
    files: dict[str, File]
    format: int = FORMAT

    def faults(self, directory: Path, *, content: bool = True, block: int = BLOCK) -> list[str]:
        """List the files that are missing, added, or of another size or content; content costs one read of all.

        `block`: the bytes that are in memory at a time.
        """
        present = {path.name for path in directory.iterdir()} - {FILE}
        wrong = present ^ self.files.keys()
        for name, file in sorted(self.files.items(), key=lambda item: -item[1].size):  # the long work starts first
            path = directory / name
            if name not in present:
                continue
            if path.stat().st_size != file.size or (content and sha256(path, block=block) != file.sha256):
                wrong.add(name)
        return sorted(wrong)


def write(directory: Path, name: str, source: str, source_sha256: str, stored_dtype: str) -> None:
    """Describe the files of a directory in its manifest. Cost: one read of all of them."""
    files = {path.name: File(path.stat().st_size, sha256(path)) for path in sorted(directory.iterdir())}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = versions_of("loclin", "torch", "transformers", "gguf")
    manifest = Manifest(name, source, source_sha256, stored_dtype, created, versions, files)
    (directory / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def read(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None when it is missing, damaged, or of another format."""
    try:
        manifest = msgspec.json.decode((directory / FILE).read_bytes(), type=Manifest)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None
    return manifest if manifest.format == FORMAT else None
