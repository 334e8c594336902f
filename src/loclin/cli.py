"""The command line. Everything it does can be done from Python."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loclin.commands import attribute, coverage, explain, faithfulness, layers, models, steer, validity, watch
from loclin.commands.group import OneLineGroup

app = typer.Typer(
    name="loclin",
    help="Write a language model, at one prompt, as the linear map that it exactly is there.",
    epilog='Start with:  loclin explain "The bridge out of Marin is the"',
    cls=OneLineGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(explain.explain)
app.command()(layers.layers)
app.command()(attribute.attribute)
app.command()(steer.steer)
app.command()(watch.watch)
app.command()(validity.validity)
app.command()(faithfulness.faithfulness)
app.command()(coverage.coverage)
app.add_typer(models.app, name="models")


def _version(wanted: bool | None) -> None:
    if wanted:
        from loclin import __version__

        typer.echo(f"loclin {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    _: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True),
    ] = None,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line."""
    app()
