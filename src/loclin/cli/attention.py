"""`loclin attention`: why a head attends where it does."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, join_json, step
from loclin.cli.targets import Units


@options.spread
def attention(
    prompt: options.Prompt,
    head: Annotated[str, options.text("The query head, such as L15H1.")],
    key: Annotated[
        int | None,
        typer.Option(
            help="The position that is attended to. Default: where the head attends most, attention sinks and the "
            "beginning token aside."
        ),
    ] = None,
    query: Annotated[int, typer.Option(help="The position that attends; -1 is the last, the mask or the class.")] = -1,
    by: Annotated[
        list[str] | None,
        options.text(
            "Share the score among: token, layer, head, neuron, bias, tokenxlayer; again for more. Default: token."
        ),
    ] = None,
    top: options.Top = 20,
    *,
    units: Units,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Show why a head attends there: its score for a query and a key as exact shares of what each of them reads.

    loclin attention "The Golden Gate" --head L29H1 --key 3 --by token --by layer --model smollm2-135m
    """
    grouped, text = units.read(), options.read(prompt)
    with importing():
        from loclin.analyses.attribution.attribute import parse_level
    levels: list[Any] = [parse_level(name) for name in by or ["token"] * (grouped is None)]
    lin = freezing.linearize(text)
    found = []
    for level in dict.fromkeys([*levels, *[grouped] * (grouped is not None)]):
        about = {"skip": units.skip} if level == "token" or level is grouped else {}
        found.append(lin.attention_score(head, key=key, query=query, by=level, progress=step, **about))

    deliver(found, json=json, html=html, to_json=lambda: join_json({one.by_query.by: one for one in found}), top=top)
