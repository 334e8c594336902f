"""`loclin coverage`: which families of language models are exact."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, step

_GATES = get_args(options.Gate)


def coverage(
    family: Annotated[
        list[str] | None,
        options.text("Try this family; give it again for more. Default: all of the task."),
    ] = None,
    task: Annotated[options.Task, typer.Option(help="What the models predict.")] = "causal",
    gate: Annotated[
        list[str] | None,
        options.several_of("Try this gate split; give it again for more. Default: all three.", *_GATES),
    ] = None,
    json: options.Record = None,
    markdown: options.Markdown = None,
    fresh: options.Fresh = False,
) -> None:
    """Certify a tiny random model of every family of models, and say which are exact.

    loclin coverage --family llama --family gpt2
    """
    with importing():
        from loclin.analyses.coverage.run import coverage as run
        from loclin.report.coverage import coverage_markdown
        from loclin.results.files import write_text
    gates = [name for name in _GATES if not gate or name in gate]
    record = run(family, task=task, gates=gates, path=json, fresh=fresh, progress=step)
    shown = record if family is None else record.only(family)
    page = {markdown: lambda path: write_text(path, coverage_markdown(record))}
    deliver(shown, others=page, recorded=json, code=int(shown.counts["error"] > 0))
