"""One request to the hub for a model's exact revision: without a network the answer is one line, not minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loclin.errors import ModelError

TIMEOUT = 10.0  # seconds


def resolve_revision(name: str, revision: str | None, token: Any = None, cache_dir: Any = None) -> dict[str, Any]:
    """Find a hub model's commit by one request, or its downloaded copy, as arguments for `from_pretrained`."""
    from huggingface_hub import constants, model_info, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    refusals = {  # a gated repository is one that is not found, too
        GatedRepoError: describe_gated(name),
        RevisionNotFoundError: f"{name} has no revision {revision!r} on the hub: give a branch, tag or commit that "
        "exists",
        RepositoryNotFoundError: f"the hub has no model {name}, or it is private: check the name, or log in "
        "(hf auth login)",
        HFValidationError: f"{name!r} is not a hub id, and no such directory or .gguf file exists: check the name",
    }
    unreachable: Exception = ConnectionError("HF_HUB_OFFLINE is set")
    if not constants.HF_HUB_OFFLINE:
        try:
            return {"revision": model_info(name, revision=revision, token=token, timeout=TIMEOUT).sha}
        except Exception as fault:
            refusal = next((text for kind, text in refusals.items() if isinstance(fault, kind)), None)
            if refusal is not None:
                raise ModelError(refusal) from fault
            unreachable = fault  # no network, in any of the ways the HTTP client may say so
    copy = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    if isinstance(copy, str):  # …/snapshots/COMMIT/config.json
        return {"revision": Path(copy).parent.name, "local_files_only": True}
    raise ModelError(
        f"the hub cannot be reached to get {name}, and there is no downloaded copy; give a local directory or a .gguf "
        "file, which need no hub"
    ) from unreachable


def describe_gated(name: str) -> str:
    """Say what to do about a gated model."""
    return f"{name} is gated: accept its terms on its hub page and log in (hf auth login)"
