"""Heavy imports, without the warnings that other libraries log meanwhile."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from loclin.common.shared import SharedState


def _log_no_warnings(stack: ExitStack) -> None:
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.WARNING)


quiet_imports = SharedState(_log_no_warnings)
"""Logs no warnings inside: transformers imports what is installed (torchao, ...), whatever is used of it."""
