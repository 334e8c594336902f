"""`loclin watch`: do a prompt's large singular vectors write words that one watches for."""
# ruff: noqa: UP045 (as the other commands write them)

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, deliver, importing
from loclin.errors import PromptError


@options.spread
def watch(
    prompt: options.Prompt,
    words: Annotated[
        Path, typer.Option(help="A text file with the words to watch for, one a line.", callback=options.place)
    ],
    k: Annotated[int, typer.Option(help="How many singular vectors of each token's map to look at.", min=1)] = 8,
    top: Annotated[
        int, typer.Option(help="A vector is hit when a watched word is among so many of its words.", min=1)
    ] = 5,
    layer: Annotated[Optional[int], typer.Option(help="Look at this layer's output, not at the final state.")] = None,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Look at attention sinks too, whose vectors write whatever is likely.")
    ] = False,
    save: Annotated[
        Optional[Path], typer.Option(help="Write the projection to this .safetensors file.", callback=options.place)
    ] = None,
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Find the large singular vectors that write watched words, their part of each logit, and what removing them does.

    loclin watch "The bridge out of Marin is the" --words words.txt
    """
    text = options.read(prompt)
    try:
        listed = [line.strip() for line in words.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the watch list {words}: {error}") from error
    if not listed:
        raise PromptError(f"the watch list {words} is empty; write one word a line")
    with importing():
        from loclin.steering.watch import watch as run
    lin = freezing.linearize(text)
    found = run(lin, listed, k=k, top=top, layer=layer, sinks=sinks, progress=Steps())
    deliver(found, json=json, html=html, others={save: found.projection.save} if found.projection else {})
