"""`loclin attribute`: a logit as a sum of exact shares, by token, layer, head, neuron or bias."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, join_json, note, step
from loclin.cli.targets import Units, read_target
from loclin.errors import OptionError

Rivals = Literal["runner-up", "others", "mean"]
_TARGETS = {"target", "target_id", "against", "margin", "log_probability", "probability", "generated"}


@options.spread
def attribute(
    prompt: options.Prompt,
    target: Annotated[
        str | None,
        options.text(
            "Share out this token's logit, such as ' Bridge', or the sum over several tokens that follow the prompt. "
            "Default: the predicted one's over the mean of all."
        ),
    ] = None,
    target_id: Annotated[
        int | None, typer.Option(help="The same by the token's id, for tokens that cannot be typed.", min=0)
    ] = None,
    against: Annotated[
        str | None, options.text("Share out the difference to this token, or to several: what else might follow.")
    ] = None,
    margin: Annotated[
        Rivals | None,
        typer.Option(
            help="Share out the logit minus the largest other, the probable others' mean, or the mean of all."
        ),
    ] = None,
    log_probability: Annotated[
        bool, typer.Option("--log-probability", help="Share out the log-probability instead of the logit.")
    ] = False,
    probability: Annotated[
        bool, typer.Option("--probability", help="Share out the probability, to first order at the prompt.")
    ] = False,
    generated: Annotated[
        int | None,
        typer.Option(help="Share out so many tokens that the model writes next, all together.", min=1),
    ] = None,
    neuron: Annotated[str | None, options.text("Share out an MLP neuron's activation instead, such as L17N80.")] = None,
    by: Annotated[
        list[str] | None,
        options.text(
            "Share it among: token, layer, head, neuron, bias, tokenxlayer, or adapter (of a LoRA); again for more. "
            "'all' is every level that the model has. Default: token."
        ),
    ] = None,
    attention: Annotated[
        Literal["frozen", "shared"],
        typer.Option(help="shared: let relevance through queries and keys too. Not exact: it misses the target."),
    ] = "frozen",
    position: options.Position = -1,
    top: options.Top = 20,
    *,
    units: Units,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Share out a logit exactly: what each token, layer, head, neuron or bias gives of it. Every level sums to it.

    loclin attribute "The Golden Gate" --target " Bridge" --by head --model smollm2-135m --html heads.html
    """
    options.exclude("target", "target_id", "generated", why="each names the tokens")
    options.exclude("target_id", "generated", why="each names the tokens")
    for one, other in combinations(("against", "margin", "log_probability", "probability"), 2):
        options.exclude(one, other, why="each says what is shared out")
    named = _TARGETS & options.named()
    if neuron is not None and named:
        raise OptionError(f"--neuron stands alone: leave {', '.join(sorted(map(options.spell, named)))} out")
    grouped = units.read()
    text = options.read(prompt)
    with importing():
        from loclin.analyses.attribution.attribute import LEVELS, parse_level
    measure = margin or ("log-probability" if log_probability else "probability" if probability else None)
    chosen = read_target(target if target_id is None else target_id, against, measure, neuron, generated)
    everything = "all" in (by or ())
    if everything and attention == "shared":
        raise OptionError("--attention shared has shares of tokens and groups of them: leave --by all out")
    every = (*LEVELS, *["adapter"] * (freezing.adapter is not None))
    levels = every if everything else [parse_level(name) for name in by or ["token"] * (grouped is None)]
    lin = freezing.linearize(text)
    found = []
    for name in dict.fromkeys([*levels, *[grouped] * (grouped is not None)]):
        about: dict[str, Any] = {"attention": attention}
        if name not in LEVELS or name == "token":
            about["skip"] = units.skip
        try:
            found.append(
                lin.attribute(chosen, by=name, position=position, in_words=max(top, 40), progress=step, **about)
            )
        except OptionError as missing:
            if not everything or name in ("token", "bias"):
                raise
            note(f"no shares by {name}: {missing}")

    deliver(found, json=json, html=html, to_json=lambda: join_json({one.by: one for one in found}), top=top)
