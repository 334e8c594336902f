"""What every command shares: where it prints, and how it ends when something goes wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from loclin.errors import LoclinError

stdout = Console()
stderr = Console(stderr=True)


def say(error: BaseException | str) -> None:
    """Say what is wrong: one line, however long it is, whatever is in it."""
    stderr.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Say what a person should know beside the result, on standard error."""
    stderr.print(escape(text), soft_wrap=True, highlight=False)


@contextmanager
def one_clear_line(interrupted: str = "nothing was written") -> Iterator[None]:
    """A user's mistake is one line and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except LoclinError as error:
        say(error)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        say("out of memory; try a smaller --memory, a shorter prompt or --dtype bfloat16")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print(f"interrupted; {escape(interrupted)}", soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def importing(interrupted: str = "nothing was written") -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: libraries catch it there, and go on.

    A terminal is told first, since PyTorch and transformers take seconds.
    """
    if "torch" not in sys.modules:
        Steps()("loading PyTorch and transformers")

    def stop(_signal: int, _frame: object) -> None:
        stderr.print(f"interrupted; {escape(interrupted)}", soft_wrap=True)
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if in_main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Show that something is running, for as long as it does."""
    with stderr.status(name):
        yield


class Steps:
    """Names the step that is running; the sweeps draw their own bar with the time left."""

    def __call__(self, step: str) -> None:
        """Name a step, on a terminal."""
        if stderr.is_terminal:
            stderr.print(f"[dim]{escape(step)} …[/]", soft_wrap=True)
