"""`loclin validity`: how far from its prompt the frozen map still predicts the model."""

from __future__ import annotations

from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import importing, one_clear_line, stdout
from loclin.cli.options import GateOption, PrecisionOption
from loclin.errors import OptionError


def validity(
    prompt: options.Prompt,
    model: options.ModelName = options.DEFAULT_MODEL,
    position: options.Position = -1,
    draws: Annotated[int, typer.Option(help="How many random directions to move the whole input in.", min=0)] = 4,
    swaps: Annotated[
        int, typer.Option(help="How many nearest and how many random tokens to move each token to.", min=0)
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of random directions and tokens.", min=0, max=options.SEEDS)] = 0,
    gate: options.Gate = GateOption.activation,
    precision: options.Precision = PrecisionOption.auto,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    bos: options.Bos = None,
    memory: options.Memory = None,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Move the input away from the prompt, and compare the frozen map with the model itself.

    loclin validity "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    with one_clear_line():
        if draws + swaps < 1:
            raise OptionError("give at least one random direction (--draws) or one swap (--swaps)")
        text = options.read(prompt)
        with importing():
            from loclin.analyses.validity import validity as run
            from loclin.report import render_validity, write_text, write_validity

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
        found = run(lin, position, draws=draws, swaps=swaps, seed=seed)
        options.write(json, lambda path: write_text(path, found.to_json()))
        options.write(html, lambda path: write_validity(found, path))
        render_validity(found, stdout)
        options.wrote(json, html)
