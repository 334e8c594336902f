"""`loclin faithfulness`: shares against what removing tokens does to the model."""

from __future__ import annotations

from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, note, stderr


def faithfulness(
    model: options.ModelName = options.DEFAULT_MODEL,
    bos: options.Bos = None,
    prompts: Annotated[int | None, typer.Option(help="How many prompts; all by default.", min=1)] = None,
    planes: Annotated[int, typer.Option(help="On how many to project the input off singular planes.", min=0)] = 16,
    seed: Annotated[
        int, typer.Option(help="Of the prompts' order, random orders and random planes.", min=0, max=options.SEEDS)
    ] = 0,
    json: options.Record = None,
    markdown: options.Markdown = None,
    fresh: options.Fresh = False,
) -> None:
    """Compare shares with what removing tokens does to the model, on prompts that come with loclin.

    loclin faithfulness --model smollm2-135m --bos --json smollm2.json --markdown smollm2.md
    """
    with importing():
        from loclin.analyses.faithfulness.prompts import load_prompts
        from loclin.analyses.faithfulness.study import faithfulness as run
        from loclin.analyses.faithfulness.summary import check_scipy
        from loclin.models import load
        from loclin.report.faithfulness import faithfulness_markdown
        from loclin.results.files import write_text

        check_scipy()
    chosen = load_prompts(prompts, seed)
    with stderr.status(f"loading {model}"):
        loaded = load(model)
    found = run(loaded, chosen, bos=bos, seed=seed, path=json, fresh=fresh, planes=planes, progress=note)
    page = {markdown: lambda path: write_text(path, faithfulness_markdown(found))}
    deliver(found, others=page, recorded=json)
