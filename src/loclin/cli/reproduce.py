"""`loclin reproduce`: the paper's figures and tables of one model, compared with the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, kept, note, step
from loclin.errors import OptionError


@options.spread
def reproduce(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="fig2 to fig6, figA1, table1 to table7, steering (Table 4).", callback=options.plain),
    ] = None,
    out: Annotated[Path | None, options.path("The folder of all files; made if it is not there.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Make all of them.")] = False,
    prompt: Annotated[str | None, options.text("Another prompt than the paper's; then nothing is compared.")] = None,
    as_published: Annotated[
        bool,
        typer.Option("--as-published", help="Make what the published code gets wrong, too, beside what is right."),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: remove what an earlier run has written.")] = False,
    *,
    freezing: options.Freezing,
) -> None:
    """Make the paper's figures and tables of a model in one folder, and compare them with the published figures.

    loclin reproduce --all --model smollm2-135m --out repro/

    An interrupted run goes on with the same command. Exit code 0: all is exact, and nothing differs from the paper;
    1: a certificate failed, or a published figure differs; 2: bad input.
    """
    if bool(targets) == everything:
        raise OptionError("name targets, or give --all: fig2 to fig6, figA1, table1 to table7, steering")
    if out is None:
        raise OptionError("name the folder: --out DIR")
    if freezing.decoder is not None or freezing.image or freezing.task not in (None, "causal"):
        raise OptionError("the paper's figures are of causal models of text: leave --decoder, --image and --task out")
    kept.set(f"what is finished is kept: the same command goes on ({out})")
    with importing():
        from loclin.reproduction.run import reproduce as run
    loading = ("dtype", "device", "devices", "device_map", "revision", "stream", "task")
    found = run(
        freezing.model,
        out,
        None if everything else targets,
        prompt=prompt,
        as_published=as_published,
        gate=freezing.gate,
        precision=freezing.precision,
        bos=freezing.bos,
        memory=freezing.memory,
        fresh=fresh,
        progress=_tell,
        **{name: value for name in loading if (value := getattr(freezing, name)) is not None},
    )
    deliver(found, recorded=out / "index.html", code=int(not found.passed))


def _tell(line: str) -> None:
    """Say always what was planned and made; steps in between on a terminal alone."""
    (note if line.startswith("[") else step)(line)
