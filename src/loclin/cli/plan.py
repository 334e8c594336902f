"""`loclin plan`: what analyses of a model will cost, before its weights are anywhere near."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, step


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Packaged name, hub id, local directory, or .gguf file; any name with --config-file.",
            callback=options.place,
        ),
    ],
    tokens: Annotated[int, typer.Option(help="The length of the prompt, in tokens.", min=1)] = 8,
    analysis: Annotated[
        list[str] | None,
        options.text(
            "What to plan: attribute, attribute-layer, attribute-head, attribute-neuron, attribute-tokenxlayer, "
            "certify, dense, explain, joint-svd, layers, svd; give it again for more. Default: the usual ones."
        ),
    ] = None,
    config_file: Annotated[Path | None, options.path("The model's config.json, so that no hub is asked.")] = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    stream: Annotated[bool, typer.Option("--stream", help="Plan for layers that stay on disk.")] = False,
    gate: Annotated[options.Gate, typer.Option(help="What is frozen, as in the other commands.")] = "activation",
    memory: options.Memory = None,
    available: Annotated[
        str | None, options.text("Memory of the machine, such as 24GB. Default: what is free on this one.")
    ] = None,
    rate_flops: Annotated[
        float | None, options.finite("The machine's flops per second, such as 2e11. Default: measured here.", above=0.0)
    ] = None,
    rate_memory: Annotated[
        float | None, options.finite("Bytes per second from its memory. Default: measured here.", above=0.0)
    ] = None,
    rate_read: Annotated[
        float | None, options.finite("Bytes per second from its disk. Default: 2e9.", above=0.0)
    ] = None,
    json: options.Json = None,
) -> None:
    """Plan analyses of a model by its config alone: memory, flops, bytes read, time, and what to change to make it fit.

    loclin plan meta-llama/Llama-3.3-70B-Instruct --config-file config.json --dtype bfloat16 --tokens 8 --stream
    """
    with importing():
        from loclin.analyses.estimate import DEFAULT, estimate
    found = estimate(
        model,
        tokens=tokens,
        analyses=analysis or DEFAULT,
        config_file=config_file,
        revision=revision,
        dtype=dtype,
        gate=gate,
        memory=memory,
        available=available,
        stream=stream,
        rate_flops=rate_flops,
        rate_memory=rate_memory,
        rate_read=rate_read,
        progress=step,
    )
    deliver(found, json=json)
