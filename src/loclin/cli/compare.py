"""`loclin compare`: a target in two prompts, or in two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step
from loclin.cli.targets import Targeting, Units
from loclin.errors import OptionError


@options.spread
def compare(
    prompt: options.Prompt,
    other: Annotated[
        str | None,
        typer.Argument(help="The other prompt. Default: the same, in --other-model.", callback=options.plain),
    ] = None,
    other_model: Annotated[str | None, options.path("Another model, for the second prompt.")] = None,
    other_adapter: Annotated[Path | None, options.path("A PEFT adapter on the model, for the second prompt.")] = None,
    align: Annotated[
        Literal["token", "word", "sentence", "line", "turn", "example"],
        typer.Option(help="What is aligned; --group is the same."),
    ] = "token",
    *,
    units: Units,
    targeting: Targeting,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Compare a target in two prompts, or in two models: which tokens change it, by their content or by their map.

    loclin compare "The capital of France is" "The capital of Italy is" --model smollm2-135m --bos
    """
    if other is None and other_model is None and other_adapter is None:
        raise OptionError("give another prompt, or another model with --other-model or --other-adapter")
    options.exclude("align", "group", "group_pattern", why="each says what is aligned")
    chosen, aligned = targeting.read(), units.read() or align
    first = freezing.linearize(options.read(prompt))
    step("reading the other prompt")
    second = options.read(prompt if other is None else other)
    if other_model is None and other_adapter is None:
        there = freezing.freeze(first.model, second)
    else:
        changed = replace(freezing, model=other_model or freezing.model, adapter=other_adapter or freezing.adapter)
        there = changed.linearize(second)
    deliver(first.compare_prompts(there, chosen, align=aligned, skip=units.skip, progress=step), json=json, html=html)
