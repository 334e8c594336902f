"""`loclin explain`: which tokens drive a prediction, and what each token's map reads and writes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step
from loclin.cli.targets import Units
from loclin.errors import OptionError


@options.spread
def explain(
    prompt: options.Prompt,
    k: Annotated[int, typer.Option(help="How many singular vectors of each token to put into words.", min=1)] = 8,
    position: options.Position = -1,
    top: Annotated[int | None, typer.Option(help="How many of them to print. Default: 3.", min=1)] = None,
    generate: Annotated[
        int,
        typer.Option(help="Generate this many tokens greedily, and explain every step and how the maps move.", min=0),
    ] = 0,
    *,
    units: Units,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Show which tokens drive a prediction, what each token's exact map reads and writes, and that the map is exact.

    loclin explain "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    if generate and position != -1:
        raise OptionError("--generate goes on from the end of the prompt; leave --position out")
    if generate and top is not None:
        raise OptionError("--generate prints a row for each token; leave --top out")
    if top is not None and top > k:
        raise OptionError(f"--top {top} is more than --k {k}: there are no more vectors to print")
    about: dict[str, Any] = {"k": k, "group": units.read(), "skip": units.skip, "progress": step}
    lin = freezing.linearize(options.read(prompt))
    if generate:
        text = lin.generate(generate, **about)
        deliver(text, json=json, html=html, code=int(not all(one.certificate.passed for one in text.steps)))
    else:
        found = lin.explain(position=position, **about)
        deliver(found, json=json, html=html, code=int(not found.certificate.passed), top=top)
