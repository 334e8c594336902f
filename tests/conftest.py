"""Shapes and types of everything in loclin are checked at run time, in tests only.

All but `loclin.freeze`, whose functions run at every torch operation: there the check would take ten times the work.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

spec = find_spec("loclin")
assert spec is not None
assert spec.submodule_search_locations is not None
package = Path(spec.submodule_search_locations[0])
rooms = [f"loclin.{path.stem}" for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
install_import_hook([room for room in rooms if room not in ("loclin.freeze", "loclin.__init__")], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random combinations `tests/fuzz` tries; a few that are always the same where it is not said."""
    parser.addoption("--examples", type=int, default=None, help="random combinations that tests/fuzz tries")
