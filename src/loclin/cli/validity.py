"""`loclin validity`: how far from its prompt the frozen map still predicts the model."""

from __future__ import annotations

from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver
from loclin.errors import OptionError


@options.spread
def validity(
    prompt: options.Prompt,
    position: options.Position = -1,
    draws: Annotated[int, typer.Option(help="How many random directions to move the whole input in.", min=0)] = 4,
    swaps: Annotated[
        int, typer.Option(help="How many nearest and how many random tokens to move each token to.", min=0)
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of random directions and tokens.", min=0, max=options.SEEDS)] = 0,
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Move the input away from the prompt, and compare the frozen map with the model itself.

    loclin validity "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    if draws + swaps < 1:
        raise OptionError("give at least one random direction (--draws) or one swap (--swaps)")
    lin = freezing.linearize(options.read(prompt))
    deliver(lin.validity(position=position, draws=draws, swaps=swaps, seed=seed), json=json, html=html)
