"""How the command line ends: every mistake is one line and exit code 2, the parser's too."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperGroup

from loclin.commands import streams
from loclin.commands.console import note, say
from loclin.errors import LoclinError


class OneLineGroup(TyperGroup):
    """The root command."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command line and end the process: 0, 1 (not exact), 2 (a mistake), 130 (Ctrl-C), 141 (no reader)."""
        streams.prepare()
        with streams.lost_output():
            code = self._run(*args, **options)
            if code in (0, 1) and (replaced := streams.replaced()) is not None:
                note(replaced)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, *args: Any, **options: Any) -> int:
        """Run a command; gives its exit code."""
        try:
            code = super().main(*args, standalone_mode=False, **options)
            if sys.stdout is not None:
                sys.stdout.flush()
        except LoclinError as error:  # from an option's check, while the line is parsed
            say(error)
            return 2
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.discard()
            say(f"cannot write standard output: {error.strerror}")
            return 2
        except Exception as error:
            # typer's parser raises click's exceptions, of click or of its own copy: by their method, not their class
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            where = "loclin" if context is None else context.command_path
            say(f"{error.format_message().rstrip('.')}; see {where} --help")
            return 2
        return code if isinstance(code, int) else 0
