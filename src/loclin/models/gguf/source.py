"""A GGUF file, from a data package or a user's disk, and its one conversion into a plain checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loclin.common.brief import brief
from loclin.errors import ModelError, first_line
from loclin.models.checks import refuse_config, refuse_missing, refuse_unknown_family
from loclin.models.gguf.header import GgufHeader, read_header
from loclin.models.hashing import sha256
from loclin.models.options import require


@dataclass(frozen=True)
class GgufSource:
    """Where a GGUF file's bytes are, and what they must hash to."""

    name: str  # what the user calls it
    file_name: str
    sha256: str  # also names its place in the cache
    find: Callable[[], list[Path]]  # gives the files that, joined, are the GGUF file, or raises ModelError
    hint: str  # what to do if the content has another hash

    __repr__ = brief

    def place(self, scratch: Path) -> Path:
        """Put the file, joined and verified, into a scratch directory, where no other file passes for part of it."""
        files = self.find()
        got = sha256(*files)
        if got != self.sha256:
            raise ModelError(
                f"{self.file_name} has other content than expected: SHA-256 {got[:12]}…, expected "
                f"{self.sha256[:12]}…; {self.hint}"
            )
        target = scratch / "model.gguf"
        if len(files) == 1:
            target.symlink_to(files[0].resolve())
            return target
        with target.open("wb") as whole:
            for part in files:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 24)
        return target


def gguf_file(path: Path) -> GgufSource:
    """Take a user's own GGUF file. Cost: one read of the file."""
    read_header(path)  # says "cut off" before a long hash
    return GgufSource(path.name, path.name, sha256(path), lambda: [path], "it changed while it was read; try again")


def convert(gguf: Path, header: GgufHeader, name: str, target: Path, say: Callable[[str], None]) -> None:
    """Write a GGUF file, alone in its directory, as a float32 safetensors checkpoint with its tokenizer.

    Cost: reading the vocabulary dominates (transformers parses it three times): 40 s for 49 thousand tokens,
    100 s for 262 thousand, and the memory of the float32 weights twice.
    """
    require("accelerate", f"Converting {gguf.name}", "accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        say(f"Converting {name} once: reading its description …")
        config = AutoConfig.from_pretrained(**place)
        refuse_config(config, name)
        refuse_unknown_family(config, name)
        say(f"Converting {name} once: reading its weights …")
        options: dict[str, Any] = {"config": config, "dtype": torch.float32, **_unpacked()}
        loaded: Any = AutoModelForCausalLM.from_pretrained(**place, **options, output_loading_info=True)
        model, report = loaded
        refuse_missing(report, name)
        say(f"Converting {name} once: reading its tokenizer …")
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ModelError, MemoryError):
        raise
    except Exception as fault:  # the libraries raise anything at all on a file they do not like
        raise ModelError(
            f"transformers cannot read {name} ({header.architecture} GGUF): {first_line(fault)}"
        ) from fault
    say(f"Converting {name} once: writing the copy …")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _unpacked() -> dict[str, Any]:
    """Ask for plain weights: newer versions of transformers may keep blocks packed, and cannot save those."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def sync(directory: Path) -> None:
    """Write a directory and its files through to the disk."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
