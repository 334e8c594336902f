"""Checks that a model's weights have not changed since something was computed with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loclin.errors import ModelError

_SAMPLE = 64


def samples(weights: Sequence[Tensor]) -> list[bytes]:
    """64 numbers of each weight, evenly spaced, as bytes; empty for one that is not in memory.

    They are copied from each device together: every copy waits for an accelerator.
    """
    parts, found = [_evenly_spaced(weight) for weight in weights], [b""] * len(weights)
    for device in {part.device for part in parts}:
        here = [i for i, part in enumerate(parts) if part.device == device]
        copied = torch.cat([parts[i] for i in here]).cpu().split([len(parts[i]) for i in here])
        for i, part in zip(here, copied, strict=True):
            found[i] = bytes(part.numpy().data)
    return found


def _evenly_spaced(weight: Tensor) -> Tensor:
    if weight.is_meta or is_traceable_wrapper_subclass(weight):
        return torch.empty(0, dtype=torch.uint8)
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().view(torch.uint8)


class Snapshot:
    """The state of a module's parameters at one time, without a copy of them.

    A change shows in a parameter's version counter (every operation in place), in its storage and dtype (`.to`,
    `load_state_dict(assign=True)`, `.data = ...`), or in 64 of its numbers (`.data.mul_(...)`, a merged adapter).
    Offloaded parameters are not checked. Cost: milliseconds, to make it and to check all parameters.
    """

    def __init__(self, root: nn.Module) -> None:
        named = list(root.named_parameters())
        marks = _marks([weight for _, weight in named])
        self._known = {id(weight): (name, weight, own) for (name, weight), own in zip(named, marks, strict=True)}
        self._dtypes = {name: weight.dtype for name, weight in root.named_parameters()}

    def changed(self, module: nn.Module) -> list[str]:
        """The names of the changed parameters in a part of the model."""
        weights = [weight for weight in module.parameters() if id(weight) in self._known and not weight.is_meta]
        known = [self._known[id(weight)] for weight in weights]
        now = _marks(weights)
        return [
            name for (name, _, marks), after in zip(known, now, strict=True) if marks is not None and marks != after
        ]

    def changed_itself(self, root: nn.Module) -> list[str]:
        """The same for the whole model, without those that its own layers converted to another dtype."""
        return [name for name in self.changed(root) if root.get_parameter(name).dtype == self._dtypes[name]]

    def check(self, module: nn.Module, model: str) -> None:
        """Refuse to compute with weights that have changed."""
        changed = self.changed(module)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ModelError(
                f"{model}: the weights have changed since this prompt was linearized ({changed[0]}{more}), by "
                "training, an adapter, another dtype or device, or by hand; linearize the prompt again",
                changed[0],
            )


def _marks(weights: Sequence[Tensor]) -> list[tuple[Any, ...] | None]:
    """What differs after a change of each weight; None for one that is not in memory."""
    found: list[tuple[Any, ...] | None] = []
    for weight, sample in zip(weights, samples(weights), strict=True):
        place = None if weight.is_meta or is_traceable_wrapper_subclass(weight) else weight.data_ptr()
        found.append(None if weight.is_meta else (place, weight._version, weight.dtype, weight.shape, sample))
    return found
