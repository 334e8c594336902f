"""`loclin explain`: which tokens drive a prediction, and what each token's map reads and writes."""

from __future__ import annotations

from typing import Annotated

import typer

from loclin.commands import options
from loclin.commands.console import Steps, importing, one_clear_line, stdout
from loclin.commands.options import GateOption, PrecisionOption


def explain(
    prompt: options.Prompt,
    model: options.ModelName = options.DEFAULT_MODEL,
    k: Annotated[int, typer.Option(help="How many singular vectors of each token to put into words.")] = 8,
    position: options.Position = -1,
    gate: options.Gate = GateOption.activation,
    precision: options.Precision = PrecisionOption.auto,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    bos: options.Bos = None,
    memory: options.Memory = None,
    top: Annotated[int, typer.Option(help="How many singular vectors of each token to print.", min=1)] = 3,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Show which tokens drive a prediction, what each token's exact map reads and writes, and that the map is exact.

    loclin explain "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    with one_clear_line():
        text = options.checked(prompt, memory, json, html)
        with importing():
            from loclin.analyses.explain import explain as run
            from loclin.report import render_explanation, write_html, write_text

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
        explanation = run(lin, k=k, position=position, progress=Steps())
        if json is not None:
            write_text(json, explanation.to_json())
        if html is not None:
            write_html(explanation, html)
        render_explanation(explanation, stdout, top=top)
        options.wrote(json, html)
        if not explanation.certificate.passed:
            raise typer.Exit(1)
