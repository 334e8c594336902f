"""The context manager in which a model's autograd graph is linear and its output unchanged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from loclin.freeze.attention import Keep, held_attention
from loclin.freeze.hold import Hold
from loclin.freeze.rules import rule_for

_lock = threading.RLock()
"""The attention registry is the process's: one frozen context at a time."""


@contextmanager
def evaluation(root: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module of `root`; those that were in training mode are put back into it."""
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def biases(root: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `root` that a frozen map adds instead of multiplying with, by their paths."""
    return {
        name: parameter
        for name, parameter in root.named_parameters()
        if name.endswith("bias") and parameter.is_floating_point()
    }


@contextmanager
def _gradients_only_to(root: nn.Module, wanted: set[nn.Parameter]) -> Iterator[None]:
    """No parameter of `root` asks for gradients but the wanted ones."""
    changed = [parameter for parameter in root.parameters() if parameter.requires_grad != (parameter in wanted)]
    try:
        for parameter in changed:
            parameter.requires_grad_(parameter in wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(parameter not in wanted)


@contextmanager
def frozen(
    root: nn.Module,
    hold: Hold | None = None,
    *,
    name: str = "",
    live_biases: bool = False,
    keep: Keep | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Make `root`'s graph linear in its input: the coefficients in `hold` are held where the input is.

    Inside, a forward pass of `root` (a model, a layer, a norm) has its stock value, bit for bit under
    `precision="stock"`, and its autograd graph is affine in the input. Graphs built inside stay valid outside.
    On leaving, hooks, training flags, `requires_grad` and the attention registry are as they were.

    Parameters
    ----------
    root
        The module to freeze; only modules inside it are touched.
    hold
        What to hold; the paper's choice by default.
    name
        `root`'s own path, put in front of the names in error messages.
    live_biases
        Let gradients reach the biases (and nothing else), so that their constants can be collected.
    keep
        What to remember of each module's attention probabilities `[1, H, T, T]`; nothing by default.

    Yields
    ------
    dict[str, Tensor]
        What `keep` made of the attention probabilities, by module path; filled as forward passes are run.

    Raises
    ------
    NotExactError
        From the forward pass, when a rule does not describe a module it matched; the message names it.

    Notes
    -----
    Entering costs a walk over `root`'s modules. One thread at a time: a second one waits.
    """
    hold = hold or Hold()
    with _lock, ExitStack() as stack:
        stack.enter_context(evaluation(root))
        stack.enter_context(_gradients_only_to(root, set(biases(root).values()) if live_biases else set()))
        paths = {module: f"{name}.{path}".strip(".") for path, module in root.named_modules()}
        for module, path in paths.items():
            rule = None if hold.ordinary else rule_for(module)
            for handle in rule.install(module, path, hold) if rule else ():
                stack.callback(handle.remove)
        yield stack.enter_context(held_attention({id(m): path for m, path in paths.items()}, list(paths), hold, keep))
