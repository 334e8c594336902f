"""`loclin steer`: a prompt, normal and steered towards a text, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, step
from loclin.errors import OptionError

Method = Literal["operator", "published", "basis", "suffix", "activation", "mean", "random"]


@options.spread
def steer(
    prompt: Annotated[
        str, typer.Argument(help="The text to go on from; '-' reads it from standard input.", callback=options.plain)
    ],
    toward: Annotated[
        list[str] | None, options.text("A text that means the concept; give it again for more texts.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Steer this layer. Default: found by trying.")] = None,
    strength: Annotated[
        float | None,
        options.finite("How strongly; 0 (add) or 1 (interpolate) is unsteered. Default: found by trying."),
    ] = None,
    form: Annotated[
        Literal["add", "interpolate"],
        typer.Option(help="Add what steers, scaled to the hidden state's norm, or interpolate (eq. 16)."),
    ] = "add",
    method: Annotated[
        Method,
        typer.Option(
            help="The text's map, added at the layer's output (operator), or at its input with the final norm on top "
            "(published, the paper's code); or what it is compared with: see docs/steering.md."
        ),
    ] = "operator",
    words: Annotated[
        str | None, options.text("The concept's words, with commas. Default: the text's, and what follows it.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Keep so many singular triples of each map.", min=1)] = None,
    normed: Annotated[bool, typer.Option("--normed", help="Put the final norm on top of the maps.")] = False,
    max_kl: Annotated[
        float,
        options.finite("How much fluency trying may cost: KL of the next token, nats.", least=0.0),
    ] = 2.0,
    operator: Annotated[Path | None, options.path("Steer with an operator that --save wrote.")] = None,
    save: Annotated[Path | None, options.path("Write what steers to this .safetensors file.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to write at most.", min=1)] = 30,
    seed: Annotated[
        int | None, typer.Option(help="Sample with this seed. Default: greedy.", min=0, max=options.SEEDS)
    ] = None,
    temperature: Annotated[float | None, options.finite("For sampling, with --seed.", above=0.0)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    *,
    loading: options.Loading,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Steer a text towards a concept: normal and steered side by side, with strength and layer found by trying.

    loclin steer "The children are playing with the" --toward "The bank lent the company a large sum of"
    """
    _consistent()
    text = options.read(prompt)
    listed = None if words is None else [word.strip() for word in words.split(",") if word.strip()]
    if listed == []:
        raise OptionError("--words has no word in it; give some, with commas")
    with importing():
        from loclin.steering import Operator
        from loclin.steering.steer import steer as run
    held = None if operator is None else Operator.load(operator)
    found = run(
        loading.load(),
        text,
        toward or (),
        operator=held,
        words=listed,
        method=method,
        layer=layer,
        strength=strength,
        form=form,
        rank=rank,
        normed=normed,
        gate=loading.gate,
        bos=loading.bos,
        chat=chat,
        max_new_tokens=tokens,
        max_kl=max_kl,
        seed=seed,
        memory=loading.memory,
        progress=step,
        **({} if temperature is None else {"temperature": temperature}),
    )
    deliver(found, json=json, html=html, others={save: found.steering.save} if found.steering else {})


def _consistent() -> None:
    """Refuse options that contradict one another, or that nothing would heed."""
    chosen, typed = options.running.get().params, options.named()
    if (chosen["operator"] is None) == (not chosen["toward"]):
        raise OptionError("say what to steer towards: --toward TEXT, or --operator FILE, one of them")
    made = "a saved operator has its layer, method and rank"
    options.exclude("operator", "layer", "method", "rank", "normed", why=made)
    for option, methods in (("rank", ("operator", "basis")), ("normed", ("operator",))):
        if option in typed and chosen["method"] not in methods:
            raise OptionError(f"--{option} is for --method {' and '.join(methods)}; leave it out")
    if chosen["method"] not in ("operator", "mean") and len(chosen["toward"] or ()) > 1:
        raise OptionError(f"--method {chosen['method']} takes one --toward; operator and mean take several")
    if chosen["temperature"] is not None and chosen["seed"] is None:
        raise OptionError("--temperature is for sampling: give a --seed, or leave it out")
    searched = chosen["strength"] is None or (chosen["layer"] is None and chosen["operator"] is None)
    if "max_kl" in typed and not searched:
        raise OptionError(
            "--max-kl is for the search, and --layer and --strength leave nothing to search; leave it out"
        )
