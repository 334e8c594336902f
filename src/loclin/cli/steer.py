"""`loclin steer`: a prompt, normal and steered towards a text, side by side."""
# ruff: noqa: UP045 (as the other commands write them)

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from loclin.cli import options
from loclin.cli.console import Steps, importing, one_clear_line, stdout
from loclin.cli.console import step as running
from loclin.cli.options import GateOption
from loclin.errors import OptionError


class MethodOption(str, Enum):
    """What can steer, for the parser."""

    operator = "operator"
    published = "published"
    basis = "basis"
    suffix = "suffix"
    activation = "activation"
    mean = "mean"
    random = "random"


class FormOption(str, Enum):
    """The forms of steering, for the parser."""

    add = "add"
    interpolate = "interpolate"


def steer(
    prompt: Annotated[
        str, typer.Argument(help="The text to go on from; '-' reads it from standard input.", callback=options.plain)
    ],
    toward: Annotated[
        Optional[list[str]],
        typer.Option(help="A text that means the concept; give it again for more texts.", callback=options.plain),
    ] = None,
    model: options.ModelName = options.DEFAULT_MODEL,
    layer: Annotated[Optional[int], typer.Option(help="Steer this layer. Default: found by trying.")] = None,
    strength: Annotated[
        Optional[float],
        typer.Option(
            help="How strongly; 0 (add) or 1 (interpolate) is unsteered. Default: found by trying.",
            callback=options.finite(),
        ),
    ] = None,
    form: Annotated[
        FormOption, typer.Option(help="Add what steers, scaled to the hidden state's norm, or interpolate (eq. 16).")
    ] = FormOption.add,
    method: Annotated[
        MethodOption,
        typer.Option(
            help="The text's map, added at the layer's output (operator), or at its input with the final norm on top "
            "(published, the paper's code); or what it is compared with: see docs/steering.md."
        ),
    ] = MethodOption.operator,
    words: Annotated[
        Optional[str],
        typer.Option(
            help="The concept's words, with commas. Default: the text's, and what follows it.", callback=options.plain
        ),
    ] = None,
    rank: Annotated[Optional[int], typer.Option(help="Keep so many singular triples of each map.", min=1)] = None,
    normed: Annotated[bool, typer.Option("--normed", help="Put the final norm on top of the maps.")] = False,
    max_kl: Annotated[
        float,
        typer.Option(
            help="How much fluency trying may cost: KL of the next token, nats.", callback=options.finite(least=0.0)
        ),
    ] = 2.0,
    operator: Annotated[
        Optional[Path], typer.Option(help="Steer with an operator that --save wrote.", callback=options.place)
    ] = None,
    save: Annotated[
        Optional[Path], typer.Option(help="Write what steers to this .safetensors file.", callback=options.place)
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to write at most.", min=1)] = 30,
    seed: Annotated[
        Optional[int], typer.Option(help="Sample with this seed. Default: greedy.", min=0, max=options.SEEDS)
    ] = None,
    temperature: Annotated[
        Optional[float], typer.Option(help="For sampling, with --seed.", callback=options.finite(above=0.0))
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    gate: options.Gate = GateOption.activation,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    bos: options.Bos = None,
    memory: options.Memory = None,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Steer a text towards a concept: normal and steered side by side, with strength and layer found by trying.

    loclin steer "The children are playing with the" --toward "The bank lent the company a large sum of"
    """
    with one_clear_line():
        _consistent()
        text = options.read(prompt)
        listed = None if words is None else [word.strip() for word in words.split(",") if word.strip()]
        if listed == []:
            raise OptionError("--words has no word in it; give some, with commas")
        with importing():
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (what load will ask for)

            from loclin.models import load
            from loclin.report import write_text
            from loclin.report.steering import render_steered, write_steered_html
            from loclin.steering import Operator
            from loclin.steering.steer import steer as run

        held = None if operator is None else Operator.load(operator)
        with running(f"loading {model}"):
            loaded = load(model, dtype=dtype, device=device, device_map=device_map, revision=revision)
        sampling = {} if temperature is None else {"temperature": temperature}
        found, steering = run(
            loaded,
            text,
            toward or (),
            operator=held,
            words=listed,
            method=method.value,
            layer=layer,
            strength=strength,
            form=form.value,
            rank=rank,
            normed=normed,
            gate=gate.value,
            bos=bos,
            chat=chat,
            max_new_tokens=tokens,
            max_kl=max_kl,
            seed=seed,
            memory=memory,
            progress=Steps(),
            **sampling,
        )
        options.write(save, steering.save)
        options.write(json, lambda path: write_text(path, found.to_json()))
        options.write(html, lambda path: write_steered_html(found, path))
        render_steered(found, stdout)
        options.wrote(save, json, html)


def _consistent() -> None:
    """Refuse options that contradict one another, or that nothing would heed."""
    chosen, typed = options.running.get().params, options.named()
    if (chosen["operator"] is None) == (not chosen["toward"]):
        raise OptionError("say what to steer towards: --toward TEXT, or --operator FILE, one of them")
    made = "a saved operator has its layer, method and rank"
    options.exclude("operator", "layer", "method", "rank", "normed", why=made)
    for option, methods in (("rank", ("operator", "basis")), ("normed", ("operator",))):
        if option in typed and chosen["method"].value not in methods:
            raise OptionError(f"--{option} is for --method {' and '.join(methods)}; leave it out")
    if chosen["method"].value not in ("operator", "mean") and len(chosen["toward"] or ()) > 1:
        raise OptionError(f"--method {chosen['method'].value} takes one --toward; operator and mean take several")
    if chosen["temperature"] is not None and chosen["seed"] is None:
        raise OptionError("--temperature is for sampling: give a --seed, or leave it out")
    searched = chosen["strength"] is None or (chosen["layer"] is None and chosen["operator"] is None)
    if "max_kl" in typed and not searched:
        raise OptionError(
            "--max-kl is for the search, and --layer and --strength leave nothing to search; leave it out"
        )
