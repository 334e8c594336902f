"""Whether a tag may be released: the version is the same everywhere, and the changelog has an entry for it.

Usage: python .ci/check_release.py v1.2.3
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {
    "pyproject.toml": r'^version = "(.+)"$',
    "src/loclin/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}
"""Where the version is written, and how."""


def find_faults(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps a tag from being released, one line each."""
    version = tag.removeprefix("v")
    faults = [] if tag == f"v{version}" else [f"the tag {tag} does not begin with v: call it v{version}"]
    for name, pattern in VERSIONS.items():
        written = re.findall(pattern, (root / name).read_text("utf-8"), flags=re.M)
        if written != [version]:
            faults.append(f"{name} has the version {' and '.join(written) or 'none'}, and the tag is {tag}")
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    entry = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$\n(.*?)(?=^## |\Z)"
    found = re.search(entry, changelog, flags=re.M | re.S)
    if found is None or not found[1].strip():
        faults.append(
            f"CHANGELOG.md has nothing under a heading '## [{version}] - YYYY-MM-DD': name what changed there"
        )
    return faults


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if faults := find_faults(sys.argv[1]):
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print(f"{sys.argv[1]} can be released")
