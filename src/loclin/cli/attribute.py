"""`loclin attribute`: a logit as a sum of exact shares, by token, layer, head, neuron or bias."""

from __future__ import annotations

import json as jsonlib
import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import deliver, importing, note, step
from loclin.errors import OptionError

if TYPE_CHECKING:
    from loclin.analyses.attribution.target import Target

Rivals = Literal["runner-up", "others", "mean"]


@options.spread
def attribute(
    prompt: options.Prompt,
    target: Annotated[
        str | None,
        options.text(
            "Share out this token's logit, such as ' Bridge'. Default: the predicted one's over the mean of all."
        ),
    ] = None,
    target_id: Annotated[
        int | None, typer.Option(help="The same by the token's id, for tokens that cannot be typed.", min=0)
    ] = None,
    against: Annotated[str | None, options.text("Share out the difference to this token's logit.")] = None,
    margin: Annotated[
        Rivals | None,
        typer.Option(
            help="Share out the logit minus the largest other, the probable others' mean, or the mean of all."
        ),
    ] = None,
    neuron: Annotated[str | None, options.text("Share out an MLP neuron's activation instead, such as L17N80.")] = None,
    by: Annotated[
        list[str] | None,
        options.text(
            "Share it among: token, layer, head, neuron, bias, tokenxlayer; give it again for more. "
            "'all' is every level that the model has. Default: token."
        ),
    ] = None,
    position: options.Position = -1,
    top: Annotated[int, typer.Option(help="How many of the largest shares to print.", min=1)] = 20,
    *,
    freezing: options.Freezing,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """Share out a logit exactly: what each token, layer, head, neuron or bias gives of it. Every level sums to it.

    loclin attribute "The Golden Gate" --target " Bridge" --by head --model smollm2-135m --html heads.html
    """
    options.exclude("target", "target_id", why="both name the token")
    if neuron is not None and not {"target", "target_id", "against", "margin"}.isdisjoint(options.named()):
        raise OptionError("--neuron stands alone: leave --target, --against and --margin out")
    text = options.read(prompt)
    with importing():
        from loclin.analyses.attribution.attribute import LEVELS, parse_level
    chosen = _target(target if target_id is None else target_id, against, margin, neuron)
    everything = "all" in (by or ())
    levels = LEVELS if everything else [parse_level(name) for name in by or ["token"]]
    lin = freezing.linearize(text)
    found = []
    for name in dict.fromkeys(levels):
        try:
            found.append(lin.attribute(chosen, by=name, position=position, in_words=max(top, 40), progress=step))
        except OptionError as missing:
            if not everything or name in ("token", "bias"):
                raise
            note(f"no shares by {name}: {missing}")

    def to_json() -> str:
        return jsonlib.dumps({one.by: one.to_dict() for one in found}, indent=2, ensure_ascii=False, allow_nan=False)

    deliver(found, json=json, html=html, to_json=to_json, top=top)


def _target(token: str | int | None, against: str | None, margin: Rivals | None, neuron: str | None) -> Target:
    from loclin.analyses.attribution.target import Margin, Neuron

    if neuron is not None:
        named = re.fullmatch(r"L(-?\d+)N(\d+)", neuron)
        if named is None:
            raise OptionError(f"--neuron {neuron}: write L17N80 for neuron 80 of layer 17")
        return Neuron(int(named[2]), int(named[1]))
    if margin is not None:
        if against is not None:
            raise OptionError("--margin and --against exclude one another: a margin finds its own rivals")
        return Margin(token, margin)
    if against is None:
        return token
    if token is None:
        raise OptionError("--against needs --target: the difference of two tokens' logits")
    return token, against
