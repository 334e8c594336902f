"""The context manager in which a forward pass also computes linearised values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loclin.common.surroundings import eager_code, exact_arithmetic
from loclin.freeze.mode import Frozen, Keep
from loclin.freeze.options import FreezeOptions
from loclin.freeze.rules import rules_installed
from loclin.models.replica import exclusive


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode, and those that were in training mode back at the end."""
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(
    root: nn.Module,
    options: FreezeOptions | None = None,
    dtype: torch.dtype | None = None,
    *,
    name: str = "",
    collect: bool = False,
    keep: Keep | None = None,
    attention_bytes: int | None = None,
) -> Iterator[Frozen]:
    """Compute linearised values in `root`'s forward passes, with the coefficients frozen that `options` say.

    Inside, call `mode.enter(x)` on an input and then `root`; `mode.live(y)` is the output's linearised value, affine in
    that of `x`. The model's own values do not change in any bit. Graphs that are built inside stay valid outside. On
    leaving, hooks and training flags are as before; weights, classes and registries are never changed. Other threads
    see the hooks meanwhile, unless `root` is (part of) a replica (see `loclin.models.replica`), which only one thread
    at a time can freeze. Entering costs a walk over `root`'s modules; a forward pass costs two.

    Parameters
    ----------
    options
        What is frozen; the paper's choice by default.
    dtype
        The dtype of the linear path; by default from `options.precision` and `root`'s own.
    name
        `root`'s own path, a prefix of the names in error messages.
    collect
        Make every constant that is added to a live tensor a leaf, in `mode.constants`.
    keep
        What to remember of each module's attention pattern; nothing by default.
    attention_bytes
        The bytes up to which a layer's attention probabilities are made whole (see `loclin.freeze.pattern`); by default
        they always are.
    """
    options = options or FreezeOptions()
    if dtype is None:
        dtype = options.dtype(next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32))
    paths = {module: f"{name}.{path}".strip(".") or "model" for path, module in root.named_modules()}
    mode = Frozen(paths, options, dtype, collect, keep, attention_bytes)
    with exclusive(root), exact_arithmetic(), eager_code(), _evaluating(root), rules_installed(paths, mode), mode:
        yield mode
