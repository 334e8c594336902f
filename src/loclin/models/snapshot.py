"""Checks that a model's weights have not changed since something was computed with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loclin.errors import ModelError
from loclin.models.hashing import tensor_bytes

_SAMPLE = 64


def sample(weight: Tensor) -> bytes:
    """64 numbers of a weight, evenly spaced, as bytes; empty if it is not in memory."""
    if weight.is_meta or is_traceable_wrapper_subclass(weight):
        return b""
    flat = weight.detach().flatten()
    return bytes(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLE)]))


class Snapshot:
    """The state of a module's parameters at one time, without a copy of them.

    A change shows in a parameter's version counter (every operation in place), in its storage and dtype (`.to`,
    `load_state_dict(assign=True)`, `.data = ...`), or in 64 of its numbers (`.data.mul_(...)`, a merged adapter).
    Offloaded parameters are not checked. Cost: milliseconds, to make it and to check all parameters.
    """

    def __init__(self, root: nn.Module) -> None:
        self._known = {id(weight): (name, weight, _marks(weight)) for name, weight in root.named_parameters()}
        self._dtypes = {name: weight.dtype for name, weight in root.named_parameters()}

    def changed(self, module: nn.Module) -> list[str]:
        """The names of the changed parameters in a part of the model."""
        found = []
        for weight in module.parameters():
            name, _, marks = self._known.get(id(weight), ("", weight, None))
            if marks is not None and not weight.is_meta and marks != _marks(weight):
                found.append(name)
        return found

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


def _marks(weight: Tensor) -> tuple[Any, ...] | None:
    """What differs after a change; None for weights that are not in memory."""
    if weight.is_meta:
        return None
    place = None if is_traceable_wrapper_subclass(weight) else weight.data_ptr()
    return place, weight._version, weight.dtype, weight.shape, sample(weight)
