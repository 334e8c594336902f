"""Adapters on modules (LoRA): what they add as a constant, so that the model without them is live alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.errors import NotExactError
from loclin.freeze.mode import Frozen
from loclin.freeze.status import Live

ADAPTER = "adapter"
"""What the name of such a constant ends with, behind the path of the module and a dot."""


def is_adapted(module: nn.Module, _path: str = "") -> bool:
    """Whether a module is one of PEFT around another: the same with an adapter, if it is not switched off."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__) and not module.disable_adapters


def hold_adapter(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
    """Take a module's output as that of the module inside, live, plus a constant, if the options say so.

    NotExactError for an adapter that changes what enters the module, and not what leaves it.
    """
    inner = getattr(module, "base_layer", None)
    if not mode.options.adapters_held or inner is None:
        return []
    entered: list[Tensor] = []
    inside: list[tuple[Tensor, Tensor, int]] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [*args, *kwargs.values()][:1]

    def leave_inside(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        inside[:] = [([*args, *kwargs.values()][0], output, output._version)]

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if not isinstance(status := mode.status(output), Live) or not inside:
            return
        x, plain, version = inside.pop()
        with mode.paused():
            if x is not entered[0] and not x.equal(entered[0]):
                raise NotExactError(
                    f"{path}: its adapter changes what enters the module, and adds nothing behind", path
                )
            if plain._version != version:
                raise NotExactError(f"{path}: its adapter adds to the module's output in place", path)
            own = mode.live(plain)
            added = mode.constant((status.linear - own).detach(), None, ADAPTER)
            mode.attach(output, status.then(own + added))

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        inner.register_forward_hook(leave_inside, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
