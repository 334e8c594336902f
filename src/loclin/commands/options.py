"""Options that several commands have, and what they do with them."""
# ruff: noqa: UP045 (as the other commands write them)

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from loclin.commands.console import importing, stderr, step
from loclin.errors import PromptError

if TYPE_CHECKING:
    from loclin.linearization import Linearization


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


class ComponentOption(str, Enum):
    """What of a layer to look at, for the parser."""

    resid_post = "resid_post"
    attn_out = "attn_out"
    mlp_out = "mlp_out"


DEFAULT_MODEL = "gemma-3-270m"
Prompt = Annotated[str, typer.Argument(help="The text to explain; '-' reads it from standard input.")]
ModelName = Annotated[
    str, typer.Option(help="Packaged name (see 'loclin models'), hub id, local directory, or .gguf file.")
]
Position = Annotated[int, typer.Option(help="Explain the prediction after this token; -1 is the last.")]
Gate = Annotated[GateOption, typer.Option(help="Hold act(gate) (the paper), hold up, or the mean of both.")]
Precision = Annotated[
    PrecisionOption,
    typer.Option(help="The map's own precision: the model's (stock), float32, float64; auto: at least float32."),
]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16, or auto (as stored).")]
Device = Annotated[Optional[str], typer.Option(help="Such as cpu or cuda:0.")]
DeviceMap = Annotated[Optional[str], typer.Option(help="Spread the layers, such as auto.")]
Revision = Annotated[Optional[str], typer.Option(help="A hub model's branch, tag or commit.")]
Bos = Annotated[
    Optional[bool],
    typer.Option("--bos/--no-bos", help="Put a beginning token in front, or none; by default the tokenizer's way."),
]
Memory = Annotated[
    Optional[str],
    typer.Option(help="Memory for sweeps beside the map, such as 2GB. Default: a quarter of what is free."),
]
Json = Annotated[Optional[Path], typer.Option(help="Write everything to this JSON file.")]
Html = Annotated[Optional[Path], typer.Option(help="Write an interactive page to this file.")]


def checked(prompt: str, memory: str | None, json: Path | None, html: Path | None) -> str:
    """Refuse what cannot work before anything is loaded; gives the prompt's text."""
    with importing():
        from loclin import memory as budgets
        from loclin.report import check_plotly, check_writable

    for path in (json, html):
        if path is not None:
            check_writable(path)
    if html is not None:
        check_plotly()
    text = (sys.stdin.read() if prompt == "-" else prompt).removeprefix("\ufeff")  # a file's byte order mark
    if not text:
        raise PromptError("the prompt is empty: give some text")
    if memory is not None:
        budgets.parse(memory)
    return text


def linearized(
    text: str,
    model: str,
    *,
    gate: GateOption,
    precision: PrecisionOption,
    dtype: str,
    device: str | None,
    device_map: str | None,
    revision: str | None,
    bos: bool | None,
    memory: str | None,
) -> Linearization:
    """Load a model and freeze it at a prompt."""
    with importing():
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (what load will ask for)

        from loclin.linearization import linearize
        from loclin.models import load

    with step(f"loading {model}"):
        loaded = load(model, dtype=dtype, device=device, device_map=device_map, revision=revision)
    return linearize(loaded, text, gate=gate.value, precision=precision.value, bos=bos, memory=memory)


def wrote(*paths: Path | None) -> None:
    """Say which files were written."""
    for path in paths:
        if path is not None:
            stderr.print(f"wrote {escape(str(path))}")
