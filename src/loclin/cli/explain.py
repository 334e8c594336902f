"""`loclin explain`: which tokens drive a prediction, and what each token's map reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, importing, one_clear_line, stdout
from loclin.cli.options import GateOption, PrecisionOption
from loclin.errors import OptionError

if TYPE_CHECKING:
    from loclin.linearization import Linearization


def explain(
    prompt: options.Prompt,
    model: options.ModelName = options.DEFAULT_MODEL,
    k: Annotated[int, typer.Option(help="How many singular vectors of each token to put into words.", min=1)] = 8,
    position: options.Position = -1,
    gate: options.Gate = GateOption.activation,
    precision: options.Precision = PrecisionOption.auto,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    bos: options.Bos = None,
    memory: options.Memory = None,
    top: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many of them to print. Default: 3.", min=1),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(help="Generate this many tokens greedily, and explain every step and how the maps move.", min=0),
    ] = 0,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Show which tokens drive a prediction, what each token's exact map reads and writes, and that the map is exact.

    loclin explain "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    with one_clear_line():
        if generate and position != -1:
            raise OptionError("--generate goes on from the end of the prompt; leave --position out")
        if generate and top is not None:
            raise OptionError("--generate prints a row for each token; leave --top out")
        if top is not None and top > k:
            raise OptionError(f"--top {top} is more than --k {k}: there are no more vectors to print")
        text = options.read(prompt)
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
        if generate:
            _explain_steps(lin, generate, k, json, html)
            return
        explanation = run(lin, k=k, position=position, progress=Steps())
        options.write(json, lambda path: write_text(path, explanation.to_json()))
        options.write(html, lambda path: write_html(explanation, path))
        render_explanation(explanation, stdout, top=3 if top is None else top)
        options.wrote(json, html)
        if not explanation.certificate.passed:
            raise typer.Exit(1)


def _explain_steps(lin: Linearization, count: int, k: int, json: Path | None, html: Path | None) -> None:
    """What `--generate` does."""
    with importing():
        from loclin.analyses.generation import generate
        from loclin.report import render_generation, write_generation, write_text

    generation = generate(lin, count, k=k, progress=Steps())
    options.write(json, lambda path: write_text(path, generation.to_json()))
    options.write(html, lambda path: write_generation(generation, path))
    render_generation(generation, stdout)
    options.wrote(json, html)
    if not all(step.certificate.passed for step in generation.steps):
        raise typer.Exit(1)
