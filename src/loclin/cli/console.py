"""What every command shares: where it prints, and how it ends when something goes wrong."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from loclin.common.shared import quiet_imports
from loclin.errors import LoclinError

stdout = Console()
stderr = Console(stderr=True)
NOTHING = "nothing was written"
kept: ContextVar[str] = ContextVar("kept", default=NOTHING)
"""What is said of files when a command is interrupted."""


def say(error: BaseException | str) -> None:
    """Say what is wrong: one line, however long it is, whatever is in it."""
    stderr.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Say what a person should know beside the result, on standard error."""
    stderr.print(escape(text), soft_wrap=True, highlight=False)


@contextmanager
def one_clear_line() -> Iterator[None]:
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
        note(f"interrupted; {kept.get()}")
        raise typer.Exit(130) from None


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: libraries catch it there, and go on.

    A terminal is told first, since PyTorch and transformers take seconds.
    """
    if "torch" not in sys.modules:
        step("loading PyTorch and transformers")
    line = f"interrupted; {kept.get()}"  # a signal's handler may run where no context is

    def stop(_signal: int, _frame: object) -> None:
        note(line)
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if in_main else None
    try:
        with quiet_imports():
            yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def step(name: str) -> None:
    """Name the step that is running, on a terminal; the sweeps draw their own bar with the time left."""
    if stderr.is_terminal:
        stderr.print(f"[dim]{escape(name)} …[/]", soft_wrap=True)


def join_json(results: Mapping[str, Any]) -> str:
    """Several results as one JSON object, by name."""
    found = {name: result.to_dict() for name, result in results.items()}
    return jsonlib.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)


def deliver(
    result: Any,
    *,
    json: Path | None = None,
    html: Path | None = None,
    others: Mapping[Path | None, Callable[[Path], None]] | None = None,
    to_json: Callable[[], str] | None = None,
    recorded: Path | None = None,
    code: int = 0,
    top: int | None = None,
) -> None:
    """Write a result where it was asked for, show it, say what was written, and end the command.

    `others`: more places, and what writes there. `to_json`: where that is not the result's own. `recorded`: what was
    written while the result was made. `code`: the exit code, 1 where a map is not exact. `top`: how much to show.
    """
    with importing():
        import loclin.report  # noqa: F401 (how results look)
        from loclin.results import display
        from loclin.results.files import write_text
    writers: dict[Path | None, Callable[[Path], None]] = {
        **(others or {}),
        json: lambda path: write_text(path, (to_json or result.to_json)()),
        html: lambda path: write_text(path, display.page(result)),
    }
    wanted = {path: write for path, write in writers.items() if path is not None}
    for path, write in wanted.items():
        step(f"writing {path}")
        write(path)
    display.show(result, stdout, top=top)
    for path in filter(None, [recorded, *wanted]):
        stderr.print(f"wrote {escape(str(path))}")
    if code:
        raise typer.Exit(code)
