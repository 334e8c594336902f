"""The options that say which target a command looks at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loclin.cli import options
from loclin.cli.console import importing
from loclin.errors import OptionError

if TYPE_CHECKING:
    from loclin.analyses.attribution.target import Target


@dataclass(frozen=True, repr=False)
class Targeting:
    """The target of commands that look at one token's logit."""

    target: Annotated[
        str | None,
        options.text(
            "Look at this token's logit, such as ' Bridge'. Default: the predicted one's over the mean of all; "
            "in two prompts, what one predicts against what the other does."
        ),
    ] = None
    target_id: Annotated[int | None, typer.Option(help="The same by the token's id.", min=0)] = None
    against: Annotated[str | None, options.text("Look at the difference to this token's logit.")] = None
    log_probability: Annotated[
        bool, typer.Option("--log-probability", help="Look at the log-probability instead of the logit.")
    ] = False

    def read(self) -> Target:
        """The target that the options ask for."""
        options.exclude("target", "target_id", why="both name the token")
        options.exclude("against", "log_probability", why="each says what is looked at")
        token = self.target if self.target_id is None else self.target_id
        return read_target(token, self.against, "log-probability" if self.log_probability else None)


@dataclass(frozen=True, repr=False)
class Units:
    """What the shares of tokens are added up by, and which tokens are left out of rankings."""

    group: Annotated[
        Literal["word", "sentence", "line", "turn", "example"] | None,
        typer.Option(
            help="Add up the tokens' shares: by word, sentence, line, chat turn, or example (text between empty lines)."
        ),
    ] = None
    group_pattern: Annotated[str | None, options.text("Add up the tokens' shares by a pattern's matches.")] = None
    skip: Annotated[
        Literal["special", "sink"] | None,
        typer.Option(help="Leave special tokens or attention sinks out of the ranking; the sum still has them."),
    ] = None

    def read(self) -> str | re.Pattern[str] | None:
        """The unit or the pattern that was asked for."""
        options.exclude("group", "group_pattern", why="each says what is added up")
        try:
            return self.group if self.group_pattern is None else re.compile(self.group_pattern)
        except re.error as error:
            raise OptionError(f"--group-pattern {self.group_pattern}: {error}; give a regular expression") from None


def read_target(
    token: str | int | None,
    against: str | None,
    measure: str | None,
    neuron: str | None = None,
    generated: int | None = None,
) -> Target:
    """The target that options ask for."""
    with importing():
        from loclin.analyses.attribution.target import RIVALS, LogProb, Margin, Neuron, Probability, Span

    if neuron is not None:
        named = re.fullmatch(r"L(-?\d+)N(\d+)", neuron)
        if named is None:
            raise OptionError(f"--neuron {neuron}: write L17N80 for neuron 80 of layer 17")
        return Neuron(int(named[2]), int(named[1]))
    if generated is not None:
        span = Span(generated=generated, of=measure or "logit")
        return span if against is None else (span, against)
    if measure in RIVALS:
        return Margin(token, measure)
    if measure is not None:
        return LogProb(token) if measure == "log-probability" else Probability(token)
    if against is None:
        return token
    if token is None:
        raise OptionError("--against needs --target: the difference of two tokens' logits")
    return token, against
