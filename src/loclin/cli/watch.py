"""`loclin watch`: do a prompt's large singular vectors write words that one watches for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step
from loclin.errors import PromptError


@options.spread
def watch(
    prompt: options.Prompt,
    words: Annotated[Path, options.path("A text file with the words to watch for, one a line.")],
    k: Annotated[int, typer.Option(help="How many singular vectors of each token's map to look at.", min=1)] = 8,
    top: Annotated[
        int, typer.Option(help="A vector is hit when a watched word is among so many of its words.", min=1)
    ] = 5,
    layer: Annotated[int | None, typer.Option(help="Look at this layer's output, not at the final state.")] = None,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Look at attention sinks too, whose vectors write whatever is likely.")
    ] = False,
    save: Annotated[Path | None, options.path("Write the projection to this .safetensors file.")] = None,
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Find the large singular vectors that write watched words, their part of each logit, and what removing them does.

    loclin watch "The bridge out of Marin is the" --words words.txt
    """
    try:
        listed = [line.strip() for line in words.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the watch list {words}: {error}") from error
    if not listed:
        raise PromptError(f"the watch list {words} is empty; write one word a line")
    lin = freezing.linearize(options.read(prompt))
    found = lin.watch(listed, k=k, top=top, layer=layer, sinks=sinks, progress=step)
    deliver(found, json=json, html=html, others={save: found.projection.save} if found.projection else {})
