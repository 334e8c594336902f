"""`loclin coverage`: which families of language models are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli.console import Steps, importing, one_clear_line, stdout
from loclin.cli.options import GateOption, place, plain, wrote


def coverage(
    family: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Try this family; give it again for more. Default: all that transformers has.", callback=plain
        ),
    ] = None,
    gate: Annotated[
        Optional[list[GateOption]],  # noqa: UP045
        typer.Option(help="Try this gate split; give it again for more. Default: all three."),
    ] = None,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Write each family to this JSON file as it is finished, and go on from what it holds.", callback=place
        ),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the table to this Markdown file.", callback=place),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what the JSON file holds, and write over it.")] = False,
) -> None:
    """Certify a tiny random model of every family of language models, and say which are exact.

    loclin coverage --family llama --family gpt2
    """
    kept = "nothing was written" if json is None else f"what is finished is kept: the same command goes on ({json})"
    with one_clear_line(kept):
        with importing(kept):
            from loclin.report import coverage_markdown, render_coverage, write_text

        with importing(kept):
            from loclin.analyses.coverage.run import GATES
            from loclin.analyses.coverage.run import coverage as run

        chosen = None if gate is None else {option.value for option in gate}
        gates = [name for name in GATES if chosen is None or name in chosen]
        record = run(family, gates=gates, path=json, fresh=fresh, progress=Steps())
        if markdown is not None:
            write_text(markdown, coverage_markdown(record))
        shown = record if family is None else record.only(family)
        render_coverage(shown, stdout)
        wrote(json, markdown)
        if shown.counts["error"]:
            raise typer.Exit(1)
