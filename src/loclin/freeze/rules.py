"""The rules, as data: what to match, and how to make what it matched linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from loclin.freeze.gates import hold_gated_mlp
from loclin.freeze.hold import Hold
from loclin.freeze.norms import hold_layer_norm, hold_rms_norm, is_rms_norm


@dataclass(frozen=True)
class Rule:
    """How modules that play a role are frozen.

    Attributes
    ----------
    role
        What the module is: norm, gated MLP ...
    matches
        Which modules the rule is for.
    install
        (module, its path, what to hold) -> the handles of the hooks it put on the module.
    covers
        Children whose nonlinearity the rule takes care of.
    """

    role: str
    matches: Callable[[nn.Module], bool]
    install: Callable[[nn.Module, str, Hold], list[RemovableHandle]]
    covers: tuple[str, ...] = ()


def _has(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


RULES: tuple[Rule, ...] = (
    Rule("norm", is_rms_norm, hold_rms_norm),
    Rule("norm", lambda module: isinstance(module, nn.LayerNorm), hold_layer_norm),
    Rule("gated MLP", _has("gate_proj", "up_proj", "act_fn", "down_proj"), hold_gated_mlp, covers=("act_fn",)),
)


def rule_for(module: nn.Module) -> Rule | None:
    """The first rule that matches a module."""
    return next((rule for rule in RULES if rule.matches(module)), None)


def covered(root: nn.Module) -> set[nn.Module]:
    """The modules inside `root` whose nonlinearity a rule on another module takes care of."""
    return {
        module.get_submodule(child)
        for module in root.modules()
        if (rule := rule_for(module)) is not None
        for child in rule.covers
    }
