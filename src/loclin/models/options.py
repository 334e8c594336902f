"""Options of `load`, checked before anything is read: dtype, device, optional packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from loclin.errors import MissingExtraError, OptionError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}

WITHOUT_DOUBLE = frozenset({"mps"})
"""Kinds of devices that have no float64, in which loclin adds up."""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Turn a dtype's name into the dtype; "auto" stays."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise OptionError(f"dtype={str(dtype)!r}: choose one of {', '.join(DTYPES)}, auto")


def available_devices() -> list[str]:
    """List the devices of this machine that torch can use, with float64."""
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type not in WITHOUT_DOUBLE:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return devices


def parse_device(device: str | torch.device) -> torch.device:
    """Turn a device's name into the device, if this machine has it."""
    devices = available_devices()
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    # "cuda" means its first one; the processor has no others to number
    if parsed is None or f"{parsed.type}:{parsed.index or 0}" not in [*devices, "cpu:0"]:
        why = " has no float64, in which loclin adds up" if parsed is not None and parsed.type in WITHOUT_DOUBLE else ""
        raise OptionError(f"device={str(device)!r}{why}: choose one of {', '.join(devices)}")
    return parsed


def parse_devices(devices: str | Sequence[str | torch.device]) -> tuple[torch.device, ...]:
    """Turn names of devices, or "all", into the devices; OptionError for two kinds together, or one device twice.

    The processor may be named several times, to check on it what several devices do.
    """
    names = devices.split(",") if isinstance(devices, str) else [*devices]
    if names == ["all"]:
        names = available_devices()[1:] or ["cpu"]
    if not names:
        raise OptionError(f"devices={devices!r}: name at least one, or give 'all'")
    parsed = [parse_device(name.strip() if isinstance(name, str) else name) for name in names]
    found = tuple(
        torch.device("cpu") if one.type == "cpu" else torch.device(one.type, one.index or 0) for one in parsed
    )
    if len({one.type for one in found}) > 1:
        raise OptionError(f"devices={devices!r}: the processor and others exclude one another; name one kind")
    if found[0].type != "cpu" and len(set(found)) < len(found):
        raise OptionError(f"devices={devices!r}: name each device once")
    return found


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # a module that was taken out on purpose; one whose package is missing
        return False


def require(module: str, purpose: str, extra: str) -> None:
    """Insist on an optional package; the error names the command that installs it."""
    if not installed(module):
        raise MissingExtraError(purpose, module, extra)
