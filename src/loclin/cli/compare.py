"""`loclin compare`: a target in two prompts, or in two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.attribute import read_target
from loclin.cli.console import deliver, step
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
    target: Annotated[
        str | None,
        options.text(
            "Compare this token's logit. Default: the token that the second predicts against that of the first; where "
            "both predict the same, its logit over the mean of all."
        ),
    ] = None,
    target_id: Annotated[int | None, typer.Option(help="The same by the token's id.", min=0)] = None,
    against: Annotated[str | None, options.text("Compare the difference to this token's logit.")] = None,
    log_probability: Annotated[
        bool, typer.Option("--log-probability", help="Compare the log-probability instead of the logit.")
    ] = False,
    align: Annotated[Literal["token", "word"], typer.Option(help="What is aligned.")] = "token",
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Compare a target in two prompts, or in two models: which tokens change it, by their content or by their map.

    loclin compare "The capital of France is" "The capital of Italy is" --model smollm2-135m --bos
    """
    options.exclude("target", "target_id", why="both name the token")
    options.exclude("against", "log_probability", why="each says what is compared")
    if other is None and other_model is None and other_adapter is None:
        raise OptionError("give another prompt, or another model with --other-model or --other-adapter")
    chosen = read_target(
        target if target_id is None else target_id, against, "log-probability" if log_probability else None
    )
    first = freezing.linearize(options.read(prompt))
    step("reading the other prompt")
    second = options.read(prompt if other is None else other)
    if other_model is None and other_adapter is None:
        there = freezing.freeze(first.model, second)
    else:
        changed = replace(freezing, model=other_model or freezing.model, adapter=other_adapter or freezing.adapter)
        there = changed.linearize(second)
    deliver(first.compare_prompts(there, chosen, align=align, progress=step), json=json, html=html)
