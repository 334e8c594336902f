"""`loclin patch`: every activation of a second prompt in a first one, as the frozen map says, checked by runs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step
from loclin.cli.targets import Targeting


@options.spread
def patch(
    prompt: options.Prompt,
    other: Annotated[
        str,
        typer.Argument(help="The prompt of as many tokens whose activations are put in.", callback=options.plain),
    ],
    by: Annotated[
        Literal["layer", "head"],
        typer.Option(help="layer: the residual stream, attentions and MLPs. head: query heads."),
    ] = "layer",
    verify: Annotated[
        int, typer.Option(help="Check so many of the largest changes of each kind by runs of the model.", min=0)
    ] = 0,
    top: Annotated[int, typer.Option(help="How many of the largest changes to print.", min=1)] = 20,
    position: options.Position = -1,
    *,
    targeting: Targeting,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Put each activation of a second prompt into the first: what the frozen map says of all of them at once.

    loclin patch "The capital of France is" "The capital of Italy is" --verify 3 --model smollm2-135m --bos
    """
    chosen = targeting.read()
    lin = freezing.linearize(options.read(prompt))
    step("reading the other prompt")
    second = freezing.freeze(lin.model, other)
    found = lin.patch(second, chosen, by=by, position=position, verify=verify, progress=step)
    deliver(found, json=json, html=html, top=top)
