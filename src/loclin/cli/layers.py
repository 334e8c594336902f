"""`loclin layers`: every layer's maps, how dimension falls and words appear with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, deliver, importing

COMPONENTS = ("resid_post", "attn_out", "mlp_out")


@options.spread
def layers(
    prompt: options.Prompt,
    component: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Look at this one alone; give it again for more. Default: all that every layer has.",
            metavar=f"<{'|'.join(COMPONENTS)}>",
            callback=options.one_of(*COMPONENTS),
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
    text = options.read(prompt)
    with importing():
        from loclin.analyses.layers import explain_layers
    lin = freezing.linearize(text)
    found = explain_layers(lin, k=k, position=position, components=component, signs=signs, progress=Steps())
    deliver(
        found,
        json=json,
        html=html,
        others={save: found.spectra.save} if found.spectra else {},
        code=int(not found.passed),
    )
