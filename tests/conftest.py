"""Shapes and types of everything in loclin are checked at run time, in tests only."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook("loclin", "beartype.beartype")
