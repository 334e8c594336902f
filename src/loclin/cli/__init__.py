"""The command line. Everything it does can be done from Python."""

from __future__ import annotations

from typing import Annotated

import typer

from loclin.cli import (
    attention,
    attribute,
    compare,
    coverage,
    explain,
    explore,
    faithfulness,
    figure,
    intervene,
    layers,
    models,
    patch,
    plan,
    reproduce,
    steer,
    validity,
    watch,
)
from loclin.cli.parser import Command, Group

app = typer.Typer(
    name="loclin",
    help="Write a language model, at one prompt, as the linear map that it exactly is there.",
    epilog='Start with:  loclin explain "The bridge out of Marin is the"',
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(explain.explain)
app.command(cls=Command)(explore.explore)
app.command(cls=Command)(layers.layers)
app.command(cls=Command)(figure.figure)
app.command(cls=Command)(reproduce.reproduce)
app.command(cls=Command)(attribute.attribute)
app.command(cls=Command)(attention.attention)
app.command(cls=Command)(intervene.intervene)
app.command(cls=Command)(patch.patch)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(steer.steer)
app.command(cls=Command)(watch.watch)
app.command(cls=Command)(validity.validity)
app.command(cls=Command)(faithfulness.faithfulness)
app.command(cls=Command)(plan.plan)
app.command(cls=Command)(coverage.coverage)
app.add_typer(models.app, name="models")


def _version(wanted: bool | None) -> None:
    if wanted:
        from loclin import __version__

        typer.echo(f"loclin {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool | None, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = None,
) -> None:
    return


def main() -> None:
    """Run the command line."""
    app()
