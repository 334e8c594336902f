"""Pieces of HTML that the page and the notebook share; what comes from a model or a prompt is escaped."""

from __future__ import annotations

import re
from html import escape
from typing import Any, Protocol, runtime_checkable

from loclin.analyses.decode import Words
from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.report.choose import full_colour
from loclin.report.text import EMPTY, NEWLINE, SPACE, TAB, error, number, outcome, percent, signed, visible

_MARK = re.compile(f"[{SPACE}{NEWLINE}{TAB}{EMPTY}]+")


@runtime_checkable
class Warned(Protocol):
    """What every result has."""

    @property
    def warnings(self) -> list[str]:
        """What a reader should know first."""


@runtime_checkable
class Predicted(Protocol):
    """What every explanation has."""

    @property
    def predictions(self) -> Words:
        """The most probable next tokens."""

    @property
    def target(self) -> dict[str, Any]:
        """The one that is explained."""

    @property
    def warnings(self) -> list[str]:
        """What a reader should know first."""


def token(text: str, limit: int | None = None) -> str:
    """Write a token with its drawn whitespace made faint."""
    return _MARK.sub(lambda mark: f"<i>{mark[0]}</i>", escape(visible(text, limit)))


def chips(explanation: Explanation, tag: str = "span") -> str:
    """Write the prompt as token chips, coloured by share; a line ends where the prompt's line ends."""
    full = full_colour(explanation.tokens)
    return "".join(_chip(i, part, full, tag) for i, part in enumerate(explanation.tokens))


def _chip(index: int, part: TokenExplanation, full: float, tag: str) -> str:
    button = f' type="button" data-token="{index}" aria-pressed="false"' if tag == "button" else ""
    kinds = ("chip", "sink") if part.is_sink else ("chip",)
    return chip(part.text, part.share / full, describe(index, part), kinds, tag, button)


def chip(text: str, share: float, title: str, kinds: tuple[str, ...], tag: str = "span", more: str = "") -> str:
    """Write one token, coloured by its share of the full colour; a line ends where the prompt's line ends."""
    names = " ".join([*kinds, "neg" if share < 0 else "pos"])
    start = f'<{tag} class="{names}" style="--a:{0.78 * min(abs(share), 1.0):.2f}" title="{escape(title)}"{more}>'
    return f"{start}{token(text)}</{tag}>{'<br>' if text.endswith(chr(10)) else ''}"


def describe(index: int, part: TokenExplanation) -> str:
    """Put a token's numbers into a line."""
    sink = ", attention sink" if part.is_sink else ""
    return (
        f"token {index} {visible(part.text)}{sink}: share {signed(part.share)}, Frobenius norm "
        f"{number(part.frobenius_norm)}, stable rank {number(part.stable_rank)}"
    )


def predictions(explanation: Predicted, most: int = 10) -> str:
    """Write the most probable next tokens with bars."""
    shown = explanation.predictions[:most]
    top = max((p for _, p in shown), default=1.0)
    chosen = (explanation.target["text"], explanation.target["probability"])
    rows = (
        f'<li class="{"chosen" if (text, p) == chosen else ""}"><span class="word">{token(text, 24)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * p / top:.1f}%"></span></span>'
        f'<span class="num">{percent(p)}</span></li>'
        for text, p in shown
    )
    return f'<ol class="predictions">{"".join(rows)}</ol>'


def verdict(explanation: Explanation) -> str:
    """Write the certificate's verdict in a line."""
    certificate = explanation.certificate
    reconstruction, forward, *_ = certificate.checks()
    kind, name = ("exact", "EXACT") if certificate.passed else ("inexact", "NOT EXACT")
    return (
        f'<p class="verdict {kind}"><strong>{name}</strong> reconstruction error '
        f"{outcome(reconstruction)}, forward {outcome(forward)}. "
        f"Std error {error(certificate.std_error)}; "
        f"the ordinary Jacobian's is {error(explanation.ordinary_error)}.</p>"
    )


def warnings(found: Warned) -> str:
    """Write what a reader should know first."""
    return "".join(f'<p class="warning" role="note">{escape(text)}</p>' for text in found.warnings)


def token_table(explanation: Explanation, shown: list[int] | None = None, words: int = 4) -> str:
    """Write a row for each token shown, the rest in one row, the biases, and the total."""
    tokens = explanation.tokens
    shown = list(range(len(tokens))) if shown is None else shown
    rows = [_token_row(i, tokens[i], words) for i in shown]
    if len(shown) < len(tokens):
        rest = sum(t.share for t in tokens) - sum(tokens[i].share for i in shown)
        rows.append(_sum_row(f"{len(tokens) - len(shown)} others", rest, f"above: the {len(shown)} largest"))
    rows.append(_sum_row("bias", explanation.bias_share, ""))
    total = sum(t.share for t in tokens) + explanation.bias_share
    target = explanation.target
    note = f"= the {target['kind']}, {number(target['value'])}; rounding {error(abs(explanation.share_residual))}"
    rows.append(_sum_row("total", total, note))
    heads = ("", "token", "share", "norm", "stable rank", "writes (σ1)", "reads (σ1)")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f'<table class="tokens"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _token_row(index: int, part: TokenExplanation, words: int) -> str:
    sink = ' <span class="tag">sink</span>' if part.is_sink else ""
    block = part.blocks[0] if part.blocks else None
    sides = (
        f"<td>{_words(block.writes, words)}</td><td>{_words(block.reads, words)}</td>"
        if block
        else '<td colspan="2" class="note">the map is zero</td>'
    )
    return (
        f'<tr data-token="{index}"><td class="num">{index}</td>'
        f'<th scope="row"><span class="word">{token(part.text, 24)}</span>{sink}</th>'
        f'<td class="num">{signed(part.share)}</td>'
        f'<td class="num">{number(part.frobenius_norm)}</td>'
        f'<td class="num">{number(part.stable_rank)}</td>{sides}</tr>'
    )


def _words(words: Words, most: int) -> str:
    return " ".join(f'<span class="word">{token(text, 24)}</span>' for text, _ in words[:most])


def _sum_row(name: str, value: float, note: str) -> str:
    return (
        f'<tr class="sum"><td></td><th scope="row">{name}</th><td class="num">{signed(value)}</td>'
        f'<td colspan="4" class="note">{note}</td></tr>'
    )
