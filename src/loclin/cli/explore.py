"""`loclin explore`: one page that answers for any word: the exact shares of its logit, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step


@options.spread
def explore(
    prompt: options.Prompt,
    word: Annotated[
        list[str] | None,
        options.text("A word that the page must have, such as ' Marin'; give it again for more."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many words the page has.", min=1)] = 1200,
    position: options.Position = -1,
    *,
    freezing: options.Freezing,
    html: Annotated[
        Path | None,
        typer.Option("--html", "-o", help="Write the interactive page to this file.", callback=options.place),
    ] = None,
    save: Annotated[
        Path | None, options.path("Write all vectors to this .safetensors file, from which the page can be made again.")
    ] = None,
) -> None:
    """Write one page on which any word can be asked for: its logit's exact shares by token, layer and head.

    loclin explore "The Golden Gate" --model smollm2-135m --bos --html explore.html
    """
    lin = freezing.linearize(options.read(prompt))
    found = lin.explore(word or (), count=count, position=position, progress=step)
    deliver(found, html=html, others={save: found.save}, code=int(not found.certificate.passed))
