"""`loclin watch`: do a prompt's large singular vectors write words that one watches for."""
# ruff: noqa: UP045 (as the other commands write them)

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, importing, one_clear_line, stdout
from loclin.cli.options import GateOption, PrecisionOption


def watch(
    prompt: options.Prompt,
    words: Annotated[
        Path, typer.Option(help="A text file with the words to watch for, one a line.", callback=options.place)
    ],
    model: options.ModelName = options.DEFAULT_MODEL,
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
    gate: options.Gate = GateOption.activation,
    precision: options.Precision = PrecisionOption.auto,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    bos: options.Bos = None,
    memory: options.Memory = None,
    json: options.Json = None,
) -> None:
    """Find the large singular vectors that write watched words, their part of each logit, and what removing them does.

    loclin watch "The bridge out of Marin is the" --words words.txt
    """
    with one_clear_line():
        from loclin.errors import PromptError

        text = options.read(prompt)
        try:
            listed = [line.strip() for line in words.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"cannot read the watch list {words}: {error}") from error
        if not listed:
            raise PromptError(f"the watch list {words} is empty; write one word a line")
        with importing():
            from loclin.report import write_text
            from loclin.report.watch import render_watched
            from loclin.steering.watch import watch as run

        lin = options.linearized(
            text,
            model,
            gate=gate,
            precision=precision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            bos=bos,
            memory=memory,
        )
        found, projection = run(lin, listed, k=k, top=top, layer=layer, sinks=sinks, progress=Steps())
        options.write(save, projection.save)
        options.write(json, lambda path: write_text(path, found.to_json()))
        render_watched(found, stdout)
        options.wrote(save, json)
