"""`loclin layers`: every layer's maps, how dimension falls and words appear with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, importing, one_clear_line, stdout
from loclin.cli.options import ComponentOption, GateOption, PrecisionOption, SignsOption


def layers(
    prompt: options.Prompt,
    model: options.ModelName = options.DEFAULT_MODEL,
    component: Annotated[
        Optional[list[ComponentOption]],  # noqa: UP045
        typer.Option(help="Look at this one alone; give it again for more. Default: all that every layer has."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="How many singular values of each map.", min=2)] = 8,
    position: options.Position = -1,
    signs: Annotated[
        SignsOption,
        typer.Option(help="Turn vectors towards their layer's output, or the final prediction (as the author does)."),
    ] = SignsOption.layer,
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
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Write the singular triples of all maps from the embeddings to this .safetensors file.",
            callback=options.place,
        ),
    ] = None,
) -> None:
    """Show every layer as an exact linear map: how dimension falls and the prediction appears with depth.

    loclin layers "The bridge out of Marin is the" --model smollm2-135m --html layers.html --json layers.json
    """
    with one_clear_line():
        text = options.read(prompt)
        with importing():
            from loclin.analyses.layers import explain_layers
            from loclin.report import render_layers, write_layers, write_text

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
        chosen = None if component is None else [option.value for option in component]
        found = explain_layers(lin, k, position, chosen, signs.value, progress=Steps())
        options.write(json, lambda path: write_text(path, found.to_json()))
        options.write(html, lambda path: write_layers(found, path))
        options.write(save, found.spectra.save)
        render_layers(found, stdout)
        options.wrote(json, html, save)
        if not found.passed:
            raise typer.Exit(1)
