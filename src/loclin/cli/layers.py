"""`loclin layers`: every layer's maps, how dimension falls and words appear with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, step


@options.spread
def layers(
    prompt: options.Prompt,
    component: Annotated[
        list[str] | None,
        options.several_of(
            "Look at this one alone; give it again for more. Default: all that every layer has.",
            *("resid_post", "attn_out", "mlp_out"),
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="How many singular values of each map.", min=2)] = 8,
    position: options.Position = -1,
    signs: Annotated[
        Literal["layer", "final"],
        typer.Option(help="Turn vectors towards their layer's output, or the final prediction (as the author does)."),
    ] = "layer",
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
    save: Annotated[
        Path | None,
        options.path("Write the singular triples of all maps from the embeddings to this .safetensors file."),
    ] = None,
) -> None:
    """Show every layer as an exact linear map: how dimension falls and the prediction appears with depth.

    loclin layers "The bridge out of Marin is the" --model smollm2-135m --html layers.html --json layers.json
    """
    lin = freezing.linearize(options.read(prompt))
    found = lin.explain_layers(k=k, position=position, components=component, signs=signs, progress=step)
    others = {save: found.spectra.save} if found.spectra else {}
    deliver(found, json=json, html=html, others=others, code=int(not found.passed))
