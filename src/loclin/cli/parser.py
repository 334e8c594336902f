"""How the command line ends: every mistake is one line and exit code 2, the parser's too."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperCommand, TyperGroup

from loclin.cli import options, streams
from loclin.cli.console import note, one_clear_line, say
from loclin.errors import LoclinError


class Command(TyperCommand):
    """A command whose options are checked before it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Check what was typed, and run."""
        options.running.set(ctx)
        options.check()
        return super().invoke(ctx)


class Group(TyperGroup):
    """A command with others below it; the root ends the process."""

    def invoke(self, ctx: Any) -> Any:
        """Run what is below; whatever goes wrong there is said in one line."""
        options.running.set(ctx)
        with one_clear_line():
            return super().invoke(ctx)

    def main(self, args: Any = None, *more: Any, standalone_mode: bool = True, **others: Any) -> Any:
        """Run the command line and end the process: 0, 1 (not exact), 2 (a mistake), 130 (Ctrl-C), 141 (no reader)."""
        streams.prepare()
        with streams.lost_output():
            code = self._run(list(sys.argv[1:] if args is None else args) or ["--help"], *more, **others)
            if code in (0, 1) and (replaced := streams.replaced()) is not None:
                note(replaced)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, *args: Any, **others: Any) -> int:
        """Run a command; gives its exit code."""
        try:
            others |= {"standalone_mode": False, "prog_name": others.get("prog_name") or "loclin"}
            code = super().main(*args, **others)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except LoclinError as error:  # from an option's check, while the line is parsed
            say(error)
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.discard()
            say(f"cannot write standard output: {error.strerror}")
        except Exception as error:
            # typer's parser raises click's exceptions, of click or of its own copy: by their method, not their class
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            where = "loclin" if context is None else context.command_path
            said = error.format_message().rstrip(".").replace("Value error, ", "")
            say(f"{said}; see {where} --help")
        return 2
