"""States of the whole process that several threads need at once, such as imports without warnings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class SharedState:
    """A state of the whole process while any thread needs it: the first thread sets it, the last one restores it.

    If each thread restored the state that it found, overlapping threads would leave it set. `enter` sets the state, and
    puts what restores it on the stack.
    """

    def __init__(self, enter: Callable[[ExitStack], None]) -> None:
        self._enter, self._lock, self._users = enter, threading.Lock(), 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the state inside a `with`."""
        with self._lock:
            if not self._users:
                with ExitStack() as stack:
                    self._enter(stack)
                    self._restore = stack.pop_all()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._restore.close()


def _log_no_warnings(stack: ExitStack) -> None:
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.WARNING)


quiet_imports = SharedState(_log_no_warnings)
"""Logs no warnings inside: transformers imports what is installed (torchao, ...), whatever is used of it."""
