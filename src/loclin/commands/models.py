"""`loclin models`: the packaged models, and the converted copies in the cache."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from loclin.commands.console import one_clear_line, stdout
from loclin.errors import ModelError

app = typer.Typer(help="The packaged models, and the converted copies in the cache.", invoke_without_command=True)


@app.callback()
def models(context: typer.Context) -> None:
    """List the packaged models and the converted copies in the cache; 'remove NAME' deletes a copy."""
    if context.invoked_subcommand is not None:
        return
    with one_clear_line():
        from loclin.models import cache
        from loclin.models.packaged import DEFAULT, PACKAGED

        packaged = Table("name", "what", "installed", title="packaged models", title_justify="left")
        for name, entry in PACKAGED.items():
            state = "yes" if entry.installed else escape(entry.pip)
            packaged.add_row(f"{name} (default)" if name == DEFAULT else name, entry.description, state)
        stdout.print(packaged)
        found = cache.entries()
        stdout.print(f"\nconverted copies in {cache.directory()}", highlight=False, soft_wrap=True)
        if not found:
            stdout.print("  none yet: a GGUF model is converted once, when it is first loaded")
            return
        copies = Table("name", "key", "size", "converted", "state")
        for copy in found:
            date = f"{copy.date:%Y-%m-%d %H:%M}" if copy.date else "?"
            state = "ok" if copy.intact else "damaged" if copy.readable else "no permission to read it"
            copies.add_row(escape(copy.name), copy.key, f"{copy.size / 1e6:,.0f} MB", date, state)
        stdout.print(copies)


@app.command()
def remove(name: Annotated[str, typer.Argument(help="The copy's name or key, as 'loclin models' shows it.")]) -> None:
    """Delete a converted copy; it is made again when it is next needed."""
    with one_clear_line():
        from loclin.models import cache

        removed = cache.remove(name)
        if not removed:
            raise ModelError(f"no converted copy is called {name!r}; 'loclin models' lists them")
        for copy in removed:
            stdout.print(f"removed {escape(copy.name)} ({copy.key}, {copy.size / 1e6:,.0f} MB)")
