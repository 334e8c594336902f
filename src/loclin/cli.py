"""The command line: parse, call, print. Everything it does can be done from Python."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loclin.errors import LoclinError, ModelError, PromptError

app = typer.Typer(
    name="loclin",
    help="Write a language model, at one prompt, as the linear map that it exactly is there.",
    epilog='Start with:  loclin explain "The bridge out of Marin is the"',
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(
    help="The packaged models, and the converted copies in the cache.", invoke_without_command=True
)
app.add_typer(models_app, name="models")

stdout = Console()
stderr = Console(stderr=True)


class GateOption(str, Enum):
    """The gate splits, for the parser."""

    activation = "activation"
    up = "up"
    half = "half"


class PrecisionOption(str, Enum):
    """The precision rules, for the parser."""

    auto = "auto"
    stock = "stock"
    single = "single"
    double = "double"


@contextmanager
def _one_clear_line(interrupted: str = "nothing was written") -> Iterator[None]:
    """A user's mistake is one line and exit code 2; Ctrl-C is exit code 130."""
    try:
        yield
    except LoclinError as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        stderr.print("[bold red]error:[/] out of memory; try a smaller --memory, a shorter prompt or --dtype bfloat16")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print(f"interrupted; {escape(interrupted)}", soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def _importing(interrupted: str = "nothing was written") -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: libraries catch it there, and go on."""

    def stop(_signal: int, _frame: object) -> None:
        stderr.print(f"interrupted; {escape(interrupted)}", soft_wrap=True)
        os._exit(130)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, stop) if in_main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _version(wanted: bool | None) -> None:
    if wanted:
        from loclin import __version__

        typer.echo(f"loclin {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True),
    ] = None,
) -> None:
    return


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="The text to explain; '-' reads it from standard input.")],
    model: Annotated[
        str, typer.Option(help="Packaged name (see 'loclin models'), hub id, local directory, or .gguf file.")
    ] = "gemma-3-270m",
    k: Annotated[int, typer.Option(help="How many singular vectors of each token to put into words.")] = 8,
    position: Annotated[int, typer.Option(help="Explain the prediction after this token; -1 is the last.")] = -1,
    gate: Annotated[
        GateOption, typer.Option(help="Hold act(gate) (the paper), hold up, or the mean of both.")
    ] = GateOption.activation,
    precision: Annotated[
        PrecisionOption,
        typer.Option(help="The map's own precision: the model's (stock), float32, float64; auto: at least float32."),
    ] = PrecisionOption.auto,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16, float16, or auto (as stored).")] = "float32",
    device: Annotated[Optional[str], typer.Option(help="Such as cpu or cuda:0.")] = None,  # noqa: UP045
    device_map: Annotated[Optional[str], typer.Option(help="Spread the layers, such as auto.")] = None,  # noqa: UP045
    revision: Annotated[Optional[str], typer.Option(help="A hub model's branch, tag or commit.")] = None,  # noqa: UP045
    bos: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--bos/--no-bos", help="Put a beginning token in front, or none; by default the tokenizer's way."),
    ] = None,
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory for sweeps beside the map, such as 2GB. Default: a quarter of what is free."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many singular vectors of each token to print.", min=1)] = 3,
    json: Annotated[Optional[Path], typer.Option(help="Write everything to this JSON file.")] = None,  # noqa: UP045
    html: Annotated[Optional[Path], typer.Option(help="Write an interactive page to this file.")] = None,  # noqa: UP045
) -> None:
    """Show which tokens drive a prediction, what each token's exact map reads and writes, and that the map is exact.

    loclin explain "The Golden Gate" --model smollm2-135m --bos --json out.json --html out.html
    """
    with _one_clear_line():
        with _importing():
            from loclin import memory as budgets
            from loclin.report import check_plotly, check_writable, render_explanation, write_html, write_text

        for path in (json, html):
            if path is not None:
                check_writable(path)
        if html is not None:
            check_plotly()
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text:
            raise PromptError("the prompt is empty: give some text")
        if memory is not None:
            budgets.parse(memory)

        with _importing():
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (what load will ask for)

            from loclin.analyses.explain import explain as run
            from loclin.linearization import linearize
            from loclin.models import load

        with _step(f"loading {model}"):
            loaded = load(model, dtype=dtype, device=device, device_map=device_map, revision=revision)
        lin = linearize(loaded, text, gate=gate.value, precision=precision.value, bos=bos, memory=memory)
        explanation = run(lin, k=k, position=position, progress=_Steps())
        for path, write in (
            (json, lambda p: write_text(p, explanation.to_json())),
            (html, lambda p: write_html(explanation, p)),
        ):
            if path is not None:
                write(path)
        render_explanation(explanation, stdout, top=top)
        for path in (json, html):
            if path is not None:
                stderr.print(f"wrote {escape(str(path))}")
        if not explanation.certificate.passed:
            raise typer.Exit(1)


@app.command()
def coverage(
    family: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Try this family; give it again for more. Default: all that transformers has."),
    ] = None,
    gate: Annotated[
        Optional[list[GateOption]],  # noqa: UP045
        typer.Option(help="Try this gate split; give it again for more. Default: all three."),
    ] = None,
    json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write each family to this JSON file as it is finished, and go on from what it holds."),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the table to this Markdown file."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore what the JSON file holds, and write over it.")] = False,
) -> None:
    """Certify a tiny random model of every family of language models, and say which are exact.

    loclin coverage --family llama --family gpt2
    """
    kept = "nothing was written" if json is None else f"what is finished is kept: the same command goes on ({json})"
    with _one_clear_line(kept):
        with _importing(kept):
            from loclin.report import check_writable, coverage_markdown, render_coverage, write_text

        for path in (json, markdown):
            if path is not None:
                check_writable(path)

        with _importing(kept):
            from loclin.analyses.coverage import GATES
            from loclin.analyses.coverage import coverage as run

        chosen = None if gate is None else {option.value for option in gate}
        gates = [name for name in GATES if chosen is None or name in chosen]
        record = run(family, gates=gates, path=json, fresh=fresh, progress=_Steps())
        if markdown is not None:
            write_text(markdown, coverage_markdown(record))
        shown = record if family is None else record.only(family)
        render_coverage(shown, stdout)
        for path in (json, markdown):
            if path is not None:
                stderr.print(f"wrote {escape(str(path))}")
        if shown.counts["error"]:
            raise typer.Exit(1)


@models_app.callback()
def models(context: typer.Context) -> None:
    """List the packaged models and the converted copies in the cache; 'remove NAME' deletes a copy."""
    if context.invoked_subcommand is not None:
        return
    with _one_clear_line():
        from loclin.models import cache
        from loclin.models.packaged import DEFAULT, PACKAGED

        packaged = Table("name", "what", "installed", title="packaged models", title_justify="left")
        for name, entry in PACKAGED.items():
            state = "yes" if entry.installed else escape(entry.pip)
            packaged.add_row(f"{name} (default)" if name == DEFAULT else name, entry.description, state)
        stdout.print(packaged)
        found = cache.entries()
        stdout.print(f"\nconverted copies in {cache.directory()}", highlight=False, soft_wrap=True)
        if not found:
            stdout.print("  none yet: a GGUF model is converted once, when it is first loaded")
            return
        copies = Table("name", "key", "size", "converted", "state")
        for copy in found:
            date = f"{copy.date:%Y-%m-%d %H:%M}" if copy.date else "?"
            copies.add_row(
                escape(copy.name), copy.key, f"{copy.size / 1e6:,.0f} MB", date, "ok" if copy.intact else "damaged"
            )
        stdout.print(copies)


@models_app.command()
def remove(name: Annotated[str, typer.Argument(help="The copy's name or key, as 'loclin models' shows it.")]) -> None:
    """Delete a converted copy; it is made again when it is next needed."""
    with _one_clear_line():
        from loclin.models import cache

        removed = cache.remove(name)
        if not removed:
            raise ModelError(f"no converted copy is called {name!r}; 'loclin models' lists them")
        for copy in removed:
            stdout.print(f"removed {escape(copy.name)} ({copy.key}, {copy.size / 1e6:,.0f} MB)")


@contextmanager
def _step(name: str) -> Iterator[None]:
    with stderr.status(name):
        yield


class _Steps:
    """Names the step that is running; the sweeps draw their own bar with the time left."""

    def __call__(self, step: str) -> None:
        if stderr.is_terminal:
            stderr.print(f"[dim]{escape(step)} …[/]", soft_wrap=True)


def main() -> None:
    """Run the command line."""
    app()
