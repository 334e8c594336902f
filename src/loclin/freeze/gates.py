"""Gated MLPs: act(gate) * up, split as asked. Paper, equations 7 to 10.

The product is bilinear, so its linear form is not unique: any mean of "hold act(gate)" and "hold up" has its value. The
form replaces what enters the down projection, so whatever else a module does between the two is noticed and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.freeze.hold import Gate, Hold, with_value_of


def secant(module: nn.Module, z: Tensor, activated: Tensor, factor: Tensor) -> Tensor:
    """The held ratio act(z) * factor / z, times z; at z = 0 the ratio's limit, act'(0) * factor."""
    held, factor = z.detach(), factor.detach()
    ratio = activated.detach() * factor / torch.where(held == 0, 1, held)
    if (held == 0).any():
        origin = torch.zeros(1, dtype=z.dtype, device=z.device, requires_grad=True)
        with torch.enable_grad():
            slope = torch.autograd.grad(type(module).forward(module, origin).sum(), origin)[0]
        ratio = torch.where(held == 0, slope * factor, ratio)
    return z * ratio


def split_gate(act: nn.Module, gate: Tensor, activated: Tensor, up: Tensor, split: Gate) -> Tensor:
    """act(gate) * up, linear in what `gate` and `up` are linear in."""
    if split == "activation":
        return activated.detach() * up
    through_gate = secant(act, gate, activated, up)
    return through_gate if split == "up" else 0.5 * (through_gate + activated.detach() * up)


def hold_gated_mlp(module: nn.Module, path: str, hold: Hold) -> list[RemovableHandle]:
    """Freeze an MLP that has `act_fn`, `up_proj` and `down_proj`."""
    seen: dict[str, Tensor] = {}
    act, up, down = (module.get_submodule(name) for name in ("act_fn", "up_proj", "down_proj"))

    def activated(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["gate"], seen["activated"] = args[0], output

    def raised(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["up"] = output

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lin = split_gate(act, **seen, split=hold.gate)
        seen.clear()
        return (with_value_of(args[0], lin, hold, path), *args[1:])

    return [
        act.register_forward_hook(activated),
        up.register_forward_hook(raised),
        down.register_forward_pre_hook(enter),
    ]
