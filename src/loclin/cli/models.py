"""`loclin models`: the packaged models, and the converted copies in the cache."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from loclin.cli.console import importing, stdout
from loclin.cli.options import plain, running
from loclin.cli.parser import Command, Group

app = typer.Typer(
    cls=Group, help="The packaged models, and the converted copies in the cache.", invoke_without_command=True
)


@app.callback()
def models() -> None:
    """List the packaged models and the converted copies in the cache; 'remove NAME' deletes a copy."""
    if running.get().invoked_subcommand is not None:
        return
    with importing():
        from loclin.models.gguf import cache
        from loclin.models.gguf.packaged import DEFAULT, PACKAGED
        from loclin.report.table import Column, Table, put

    rows = (
        (name + " (default)" * (name == DEFAULT), entry.description, "yes" if entry.installed else entry.pip)
        for name, entry in PACKAGED.items()
    )
    columns = (Column("name", "key"), Column("what", "words"), Column("installed", "parts"))
    put(stdout, Text("packaged models", "bold"), Table.of(*columns, rows=rows))
    found = cache.entries()
    stdout.print(f"\nconverted copies in {cache.directory()}", highlight=False, soft_wrap=True)
    if not found:
        stdout.print("  none yet: a GGUF model is converted once, when it is first loaded")
        return
    copies = Table.of(Column("name", "key"), Column("key", "parts"), "size", "converted", Column("state", "parts"))
    for copy in found:
        date = f"{copy.date:%Y-%m-%d %H:%M}" if copy.date else "?"
        state = "ok" if copy.intact else "damaged" if copy.readable else "no permission to read it"
        copies.add(copy.name, copy.key, f"{copy.size / 1e6:,.0f} MB", date, state)
    put(stdout, copies)


@app.command(cls=Command)
def remove(
    name: Annotated[str, typer.Argument(help="The copy's name or key, as 'loclin models' shows it.", callback=plain)],
) -> None:
    """Delete a converted copy; it is made again when it is next needed."""
    from loclin.models.gguf import cache

    for copy in cache.remove(name):
        stdout.print(f"removed {escape(copy.name)} ({copy.key}, {copy.size / 1e6:,.0f} MB)")
