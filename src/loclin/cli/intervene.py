"""`loclin intervene`: components knocked out or replaced, as the frozen map says and as the model says."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step
from loclin.cli.targets import Targeting
from loclin.errors import OptionError


@options.spread
def intervene(
    prompt: options.Prompt,
    head: Annotated[list[str] | None, options.text("A query head, such as L15H1; again for more.")] = None,
    neuron: Annotated[list[str] | None, options.text("An MLP neuron, such as L17N80; again for more.")] = None,
    component: Annotated[
        list[str] | None, options.text("A whole attention or MLP, such as attn_out.3 or mlp_out.3; again for more.")
    ] = None,
    token: Annotated[
        list[int] | None, typer.Option(help="The embedding of the token at this position; again for more.")
    ] = None,
    zero: Annotated[bool, typer.Option("--zero", help="Replace by zero (the default).")] = False,
    mean: Annotated[bool, typer.Option("--mean", help="Replace by the mean over the prompt's positions.")] = False,
    patch: Annotated[
        str | None, options.text("Replace by the same component's output in this prompt, of as many tokens.")
    ] = None,
    at: Annotated[
        list[int] | None, typer.Option(help="Replace it at this position only; again for more. Default: everywhere.")
    ] = None,
    position: options.Position = -1,
    *,
    targeting: Targeting,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Knock components out, one at a time: what the frozen map says of it, beside what the model itself does.

    loclin intervene "The Golden Gate" --head L15H1 --head L20H3 --zero --model smollm2-135m
    """
    options.exclude("zero", "mean", "patch", why="each says what a component is replaced by")
    options.exclude("mean", "patch", why="each says what a component is replaced by")
    named = [*(head or ()), *(neuron or ()), *(component or ()), *(f"T{one}" for one in token or ())]
    if not named:
        raise OptionError("name what to replace: --head L15H1, --neuron L17N80, --component mlp_out.3, or --token 4")
    chosen = targeting.read()
    lin = freezing.linearize(options.read(prompt))
    how: dict[str, Any] = {"how": "mean" if mean and not zero else "zero"}
    if patch is not None:
        step("reading the other prompt")
        how = {"how": "patch", "patch": freezing.freeze(lin.model, patch)}
    deliver(lin.intervene(named, target=chosen, at=at, position=position, progress=step, **how), json=json, html=html)
