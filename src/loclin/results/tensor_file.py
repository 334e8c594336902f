"""Named tensors and their description in one file, with a checksum that is verified on reading."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loclin.errors import OutputError, ResultError
from loclin.models.hashing import tensor_bytes
from loclin.results.files import check_writable, readable, write_bytes, write_text

FORMAT = "1"
SUFFIX = ".safetensors"


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors to one `.safetensors` file, with `about` as JSON in its metadata.

    `PATH.json` gets `about` and the tensors' shapes, for people to read; it is never loaded. Each file is written
    completely or not at all; see `check_path` for errors. Memory: two copies of the tensors.
    """
    check_path(path)
    target = Path(path)
    # safetensors refuses tensors that share memory
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    text = json.dumps(about, ensure_ascii=False)
    write_bytes(target, save(plain, {"loclin": FORMAT, "about": text, "digest": _digest(plain, text)}))
    shapes = {name: {"shape": list(tensor.shape), "dtype": _dtype_name(tensor)} for name, tensor in plain.items()}
    described = json.dumps({"file": target.name, "tensors": shapes} | about, ensure_ascii=False, indent=1)
    write_text(_path_beside(target), described)


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse, by an OutputError, a path with another ending or that cannot be written, before anything is computed."""
    target = Path(path)
    if target.suffix != SUFFIX:
        raise OutputError(f"cannot write {target}: results are safetensors files; call it {target}{SUFFIX}")
    check_writable(target)
    check_writable(_path_beside(target))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, bit for bit and on the CPU, and `about`.

    Raises ResultError when the file is missing, cut short, altered, or of an unknown format.
    """
    target = Path(path)
    try:
        with readable(target):
            target.open("rb").close()  # safetensors reports an unreadable file as missing
            with safe_open(target, "pt") as stored:
                facts = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()} if "loclin" in facts else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ResultError(f"cannot read {target}: it is cut short, or not a safetensors file; save it again") from error
    if "loclin" not in facts:
        raise ResultError(f"cannot read {target}: loclin did not write it; name a file that save() made")
    if facts["loclin"] != FORMAT:
        raise ResultError(
            f"cannot read {target}: it has format {facts['loclin']}, not {FORMAT}; use the loclin that wrote it"
        )
    text = facts.get("about", "")
    if facts.get("digest") != _digest(tensors, text):
        raise ResultError(f"cannot read {target}: it was altered after it was written; save it again")
    return tensors, json.loads(text)


def _path_beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        digest.update(f"\n{name} {_dtype_name(tensors[name])} {list(tensors[name].shape)}\n".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
