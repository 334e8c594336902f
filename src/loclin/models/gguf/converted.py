"""Load a GGUF model from its converted copy, and check the copy while it loads."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loclin.errors import ModelError
from loclin.models import pretrained
from loclin.models.gguf import cache, manifest
from loclin.models.gguf.source import GgufSource
from loclin.models.hashing import BLOCK, SMALL_BLOCK
from loclin.models.model import Model, Source, describe

# what transformers notes in tokenizer_config.json about itself, and does not take back
_NOTES = ("backend", "tokenizer_class", "is_local", "local_files_only")


def load(source: GgufSource, name: str, kind: Source, arguments: dict[str, Any], bos_token: str | None = None) -> Model:
    """Load a GGUF model with arguments for `from_pretrained`, converting it first where no sound copy exists."""
    path = cache.obtain(source)
    read = partial(_read, path, source, name, kind, arguments, bos_token)
    with cache.readable(path, name):
        try:
            return read()
        except _AlteredError as fault:
            _replace(path, source, fault)
        try:
            return read()
        except _AlteredError as fault:
            raise ModelError(
                f"the converted copy of {name} in {path} changes after it is written ({fault}): check the disk, or set "
                "LOCLIN_CACHE to another directory"
            ) from fault


class _AlteredError(Exception):
    """A copy's files are not as they were written."""


def _read(
    path: Path, source: GgufSource, name: str, kind: Source, arguments: dict[str, Any], bos_token: str | None
) -> Model:
    record = manifest.read(path)
    if record is None:  # removed or replaced since it was found
        raise _AlteredError("its manifest is gone")
    # Hashing a gigabyte takes seconds, and so does loading it. A copy holds data only, so nothing in it runs
    # before the verdict is in.
    with ThreadPoolExecutor(max_workers=1) as pool:
        verdict = pool.submit(record.faults, path, block=SMALL_BLOCK if arguments.get("stream") else BLOCK)
        failure: ModelError | None = None
        try:
            hf = pretrained.read_weights(str(path), name, arguments)
            tokenizer = _tokenizer(path)  # last: its parser keeps the interpreter lock, and hashing must have begun
            known: dict[str, Any] = {
                "sha256": source.sha256,
                "stored_dtype": record.stored_dtype,
                "bos_token": bos_token,
            }
            model = describe(hf, tokenizer, name=name, source=kind, **known)
        except ModelError as fault:
            failure = fault
        try:
            faults = verdict.result()
        except PermissionError:
            raise
        except OSError as fault:
            raise _AlteredError(str(fault)) from fault
    if faults:
        raise _AlteredError(", ".join(faults))
    if failure is not None:
        raise failure
    return model


def _replace(path: Path, source: GgufSource, fault: _AlteredError) -> None:
    """Convert again with a warning; refuse without the source."""
    try:
        source.find()
    except ModelError as missing:
        raise ModelError(
            f"the converted copy of {source.name} in {path} is damaged ({fault}): remove it "
            f"(loclin models remove {path.name}); then convert it again: {missing}"
        ) from fault
    warnings.warn(f"The converted copy of {source.name} was altered ({fault}); converting again.", stacklevel=2)
    cache.rebuild(source)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read a copy's tokenizer from its one file; `from_pretrained` would parse it twice more (Gemma: 4.6 s, not 2)."""
    file = path / "tokenizer.json"
    try:
        if not file.is_file():
            return pretrained.read_tokenizer(str(path), path.name, {})
        options = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = path / "chat_template.jinja"
        if template.is_file():
            options["chat_template"] = template.read_text(encoding="utf-8")
        kept = {key: value for key, value in options.items() if key not in _NOTES}
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **kept)
    except ModelError:
        raise
    except Exception as fault:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"cannot read the tokenizer in {path}: {fault}") from fault
