"""The context manager in which a model's forward pass has a linear twin, and its own output is unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loclin.common.surroundings import eager_code, exact_arithmetic
from loclin.freeze.hold import Hold
from loclin.freeze.mode import Frozen, Keep
from loclin.freeze.rules import rules_installed
from loclin.models.replica import exclusive


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module of `root`; those that were in training mode are put back into it."""
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
    hold: Hold | None = None,
    dtype: torch.dtype | None = None,
    *,
    name: str = "",
    collect: bool = False,
    keep: Keep | None = None,
) -> Iterator[Frozen]:
    """Give `root`'s forward passes a linear twin: the coefficients in `hold` are held where the input is.

    Inside, call `mode.enter(x)` on an input and then `root`; `mode.live(y)` is the output's twin, affine in `x`'s.
    The model's own values are its own, bit for bit. Graphs built inside stay valid outside. On leaving, hooks and
    training flags are as they were; weights, classes and registries are never touched. Other threads meet them
    meanwhile, unless `root` is (part of) a replica (see `loclin.models.replica`), which one thread at a time freezes.

    Parameters
    ----------
    root
        The module to freeze.
    hold
        What to hold; the paper's choice by default.
    dtype
        The dtype of the linear path; by default what `hold.precision` makes of `root`'s own.
    name
        `root`'s own path, put in front of the names in error messages.
    collect
        Make a leaf of every constant that is added to a live tensor, in `mode.constants`.
    keep
        What to remember of each module's attention probabilities `[1, H, T, T]`; nothing by default.

    Notes
    -----
    Entering costs a walk over `root`'s modules; a forward pass costs two.
    """
    hold = hold or Hold()
    if dtype is None:
        dtype = hold.dtype(next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32))
    paths = {module: f"{name}.{path}".strip(".") or "model" for path, module in root.named_modules()}
    mode = Frozen(paths, hold, dtype, collect=collect, keep=keep)
    with exclusive(root), exact_arithmetic(), eager_code(), _evaluating(root), rules_installed(paths, mode), mode:
        yield mode
