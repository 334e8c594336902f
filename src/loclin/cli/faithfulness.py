"""`loclin faithfulness`: shares against what removing tokens does to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import importing, note, one_clear_line, stdout, step


def faithfulness(
    model: options.ModelName = options.DEFAULT_MODEL,
    bos: options.Bos = None,
    prompts: Annotated[Optional[int], typer.Option(help="How many prompts; all by default.", min=1)] = None,  # noqa: UP045
    planes: Annotated[int, typer.Option(help="On how many to project the input off singular planes.", min=0)] = 16,
    seed: Annotated[
        int, typer.Option(help="Of the prompts' order, random orders and random planes.", min=0, max=options.SEEDS)
    ] = 0,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Write every number to this JSON file as it goes, and go on from what it holds.",
            callback=options.place,
        ),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the tables to this Markdown file.", callback=options.place),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what the JSON file holds, and write over it.")] = False,
) -> None:
    """Compare shares with what removing tokens does to the model, on prompts that come with loclin.

    loclin faithfulness --model smollm2-135m --bos --json smollm2.json --markdown smollm2.md
    """
    kept = "nothing was written" if json is None else f"what is finished is kept: the same command goes on ({json})"
    with one_clear_line(kept):
        with importing(kept):
            from loclin.analyses.faithfulness.prompts import load as load_prompts
            from loclin.analyses.faithfulness.statistics import check_scipy
            from loclin.analyses.faithfulness.study import study
            from loclin.models import load
            from loclin.report import write_text
            from loclin.report.faithfulness import faithfulness_markdown, render_faithfulness

            check_scipy()
        chosen = load_prompts(prompts, seed)
        with step(f"loading {model}"):
            loaded = load(model)
        found = study(loaded, chosen, bos=bos, seed=seed, path=json, fresh=fresh, planes=planes, progress=note)
        if markdown is not None:
            write_text(markdown, faithfulness_markdown(found))
        render_faithfulness(found, stdout)
        options.wrote(json, markdown)
