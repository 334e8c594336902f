"""One request to the hub for a model's exact revision: without a network the answer is one line, not minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loclin.errors import ModelError

TIMEOUT = 10.0  # seconds


def resolve_revision(name: str, revision: str | None, token: Any = None, cache_dir: Any = None) -> dict[str, Any]:
    """Resolve a hub model's revision, or find its downloaded copy. Cost: one request, no retries.

    Parameters
    ----------
    name
        The hub id, "org/name".
    revision
        A branch, tag or commit.
    token
        The hub token, as transformers takes it.
    cache_dir
        Where the hub's client keeps its files, as transformers takes it.

    Returns
    -------
    dict[str, Any]
        Arguments for `from_pretrained`: the exact commit, or `local_files_only` for a downloaded copy.

    Raises
    ------
    ModelError
        When neither the hub nor a copy is available, or the hub refuses this model.
    """
    from huggingface_hub import constants, model_info, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not constants.HF_HUB_OFFLINE:
        try:
            return {"revision": model_info(name, revision=revision, token=token, timeout=TIMEOUT).sha}
        except GatedRepoError as fault:
            raise ModelError(describe_gated(name)) from fault
        except RevisionNotFoundError as fault:
            raise ModelError(
                f"{name} has no revision {revision!r} on the hub: give a branch, tag or commit that exists"
            ) from fault
        except RepositoryNotFoundError as fault:
            raise ModelError(
                f"the hub has no model {name}, or it is private: check the name, or log in (hf auth login)"
            ) from fault
        except HFValidationError as fault:
            raise ModelError(
                f"{name!r} is not a hub id, and no such directory or .gguf file exists: check the name"
            ) from fault
        except Exception as fault:  # no network, in any of the ways the HTTP client may say so
            unreachable = fault
    else:
        unreachable = ConnectionError("HF_HUB_OFFLINE is set")
    copy = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    if isinstance(copy, str):
        return {
            "revision": Path(copy).parent.name,
            "local_files_only": True,
        }  # …/snapshots/COMMIT/config.json
    raise ModelError(
        f"the hub cannot be reached to get {name}, and there is no downloaded copy; give a local directory or a .gguf "
        "file, which need no hub"
    ) from unreachable


def describe_gated(name: str) -> str:
    """Say what to do about a gated model."""
    return f"{name} is gated: accept its terms on its hub page and log in (hf auth login)"
