"""`loclin faithfulness`: shares against what taking tokens away does to the model, by two protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, note, stderr
from loclin.errors import OptionError


def faithfulness(
    model: options.ModelName = options.DEFAULT_MODEL,
    bos: options.Bos = None,
    protocol: Annotated[
        Literal["removal", "dpa"],
        typer.Option(
            help="removal: tokens taken out of prompts that come with loclin. dpa: embeddings zeroed in the order of "
            "each method's scores (disrupt and recover), on questions of --data that the model answers."
        ),
    ] = "removal",
    data: Annotated[
        Path | None,
        options.path("For dpa: a JSON list of items with a prompt and an answer; Known-1000, IOI, SQuAD."),
    ] = None,
    items: Annotated[int | None, typer.Option(help="For dpa: how many answered items; all by default.", min=1)] = None,
    prompts: Annotated[int | None, typer.Option(help="How many prompts; all by default.", min=1)] = None,
    planes: Annotated[int, typer.Option(help="On how many to project the input off singular planes.", min=0)] = 16,
    seed: Annotated[
        int, typer.Option(help="Of the prompts' order, random orders and random planes.", min=0, max=options.SEEDS)
    ] = 0,
    json: options.Record = None,
    markdown: options.Markdown = None,
    fresh: options.Fresh = False,
) -> None:
    """Compare shares, and other methods' scores, with what taking tokens away does to the model.

    loclin faithfulness --model smollm2-135m --bos --json smollm2.json --markdown smollm2.md

    loclin faithfulness --protocol dpa --data known_1000.json --items 200 --json known.json
    """
    _check(protocol)
    if protocol == "dpa":
        _disrupt(model, bos, data, items, seed, json, markdown, fresh)
        return
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


def _check(protocol: str) -> None:
    """Refuse options of the other protocol."""
    named = options.named()
    for other, own in (("removal", {"prompts", "planes"}), ("dpa", {"data", "items"})):
        if other != protocol and named & own:
            given = ", ".join(sorted(map(options.spell, named & own)))
            raise OptionError(f"{given}: only for --protocol {other}")
    if protocol == "dpa" and "data" not in named:
        raise OptionError("--protocol dpa needs --data, a JSON list of items with a prompt and an answer")


def _disrupt(
    model: str,
    bos: bool | None,
    data: Path | None,
    items: int | None,
    seed: int,
    json: Path | None,
    markdown: Path | None,
    fresh: bool,
) -> None:
    with importing():
        from loclin.analyses.faithfulness.disruption import disruption
        from loclin.analyses.faithfulness.items import load_items
        from loclin.analyses.faithfulness.summary import check_scipy
        from loclin.models import load
        from loclin.report.disruption import disruption_markdown
        from loclin.results.files import write_text

        check_scipy()
    assert data is not None
    chosen, digest = load_items(data)
    with stderr.status(f"loading {model}"):
        loaded = load(model)
    found = disruption(
        loaded, chosen, source=digest, count=items, bos=bos, seed=seed, path=json, fresh=fresh, progress=note
    )
    page = {markdown: lambda path: write_text(path, disruption_markdown(found))}
    deliver(found, others=page, recorded=json)
