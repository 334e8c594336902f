"""Heavy imports, without the warnings that other libraries log meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from loclin.common.shared import SharedState


def _log_no_warnings(stack: ExitStack) -> None:
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.WARNING)


_quiet = SharedState(_log_no_warnings)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Log no warnings inside: transformers imports what is installed (torchao, ...), whatever is used of it."""
    with _quiet():
        yield
