"""Tokens, numbers and lines as a person reads them: rich's `Text`, whose styles are classes on a page."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from rich.text import Text

from loclin.maps.certificate import Certificate, Check

SPACE, NEWLINE, TAB, EMPTY, CARRIER = "·", "↵", "⇥", "∅", "◌"
_NAMED = re.compile(r"(⟨(?:[0-9A-F]{2}(?: [0-9A-F]{2})*|(?:unused|empty) \d+)⟩)")
"""Bytes, and ids without a text, as `loclin.models.tokens` writes them: no space in them is the token's."""
MARKS = {" ": SPACE, "\n": NEWLINE, "\t": TAB}
_MARK = re.compile(f"[{SPACE}{NEWLINE}{TAB}{EMPTY}]+")
_TOKEN, _LINE = 20, 60
COMPONENTS = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}


def visible(text: str, limit: int | None = None) -> str:
    """Draw a token's whitespace, and leave nothing in it that could act on a terminal or reorder a line.

    Characters that do not print, and the marks themselves, are written as Python escapes, so that a mark
    always means what it stands for. An accent without its letter stands on a dotted circle. What is longer than
    `limit` characters ends in an ellipsis.
    """
    parts = _NAMED.split(text)  # every second one is such a name
    shown = "".join(part if i % 2 else "".join(map(_drawn, part)) for i, part in enumerate(parts)) or EMPTY
    shown = CARRIER + shown if unicodedata.category(shown[0]).startswith("M") else shown
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _drawn(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if character.isprintable() and character not in (SPACE, NEWLINE, TAB, EMPTY, CARRIER):
        return character
    return character.encode("unicode_escape").decode("ascii")


def number(value: float) -> str:
    """Give four significant digits."""
    return f"{value:.4g}"


def signed(value: float) -> str:
    """Give a share its sign and three decimals, or its size alone where those would hide it."""
    hidden = 0 < abs(value) < 5e-4
    return f"{value:+.0e}" if hidden else f"{value:+.3f}"


def error(value: float) -> str:
    """Give an error's two significant digits."""
    return "0" if value == 0 else f"{value:.2g}" if value >= 0.01 else f"{value:.1e}"


def outcome(check: Check) -> str:
    """Give a check's error, or say that nothing differs."""
    return "bit-identical" if check.identical else error(check.value)


def percent(probability: float) -> str:
    """Give a probability in per cent."""
    return f"{100 * probability:.1f} %"


def sigmas(indices: list[int]) -> str:
    """Name a singular block, counted from 1: σ3, or σ3≈σ4 where the values are near-equal."""
    names = [f"σ{i + 1}" for i in indices]
    return "≈".join(names) if len(names) <= 3 else f"{names[0]}≈…≈{names[-1]}"


def shortened(prompt: str) -> str:
    """Shorten a prompt to a line: its end, where the prediction follows."""
    line = plain(" ".join(prompt.split()))
    return line if len(line) <= _LINE else "…" + line[-_LINE:]


def plain(text: str) -> str:
    """Give a text with its own lines and spaces, and nothing in it that could act on a terminal."""
    return "\n".join(visible(line).replace(SPACE, " ") if line else "" for line in text.split("\n"))


def token(text: str, style: str = "", marks: Iterable[str] = (), limit: int | None = _TOKEN) -> Text:
    """Write a token with its drawn whitespace dimmed, and what is special about it behind it.

    The span "word" means something in HTML only; a terminal leaves it out.
    """
    shown = Text.assemble((visible(text, limit), "word"))
    if style:
        shown.stylize(style)
    shown.highlight_regex(_MARK, "dim")
    return shown.append_text(Text.assemble(*((f"◂{mark}", "yellow") for mark in marks)))


def words(found: Iterable[tuple[str, float]], most: int | None = None) -> Text:
    """Put words in a row, the best first."""
    return Text(" ").join(token(word) for word, _ in list(found)[:most])


def verdict(passed: bool, *rest: str | tuple[str, str] | Text) -> Text:
    """Write the line that says whether maps are exact."""
    name, style = ("EXACT", "bold green") if passed else ("NOT EXACT", "bold red")
    line = Text.assemble((name, style), " ", *rest)
    line.stylize("badge", 0, len(name))
    return line


def certified(certificate: Certificate, ordinary: float | None = None) -> Text:
    """Write a certificate's line: its errors, those that are too large, and what is to blame for them."""
    reconstruction, forward, *_ = checks = certificate.checks()
    line = verdict(
        certificate.passed,
        f"reconstruction {outcome(reconstruction)}, forward {outcome(forward)}, std {error(certificate.std_error)}",
        ("" if ordinary is None else f" (ordinary {error(ordinary)})", "dim"),
    )
    for check in checks:
        if not check.passed:
            line.append(f"\n  {check.name} error {outcome(check)} is beyond {error(check.limit)}", "red")
    for culprit in certificate.culprits:
        line.append(f"\n  {culprit.module} ({culprit.kind}) is not linear: error {error(culprit.error)}", "red")
    return line


def predicted(target: tuple[str, float], others: Sequence[tuple[str, float]] = ()) -> Text:
    """Write a predicted token with its probability, and those that come after it."""
    line = Text.assemble(("→ ", "bold green"), token(target[0], "bold green"), (f" {percent(target[1])}", "green"))
    for i, (text, probability) in enumerate(others):
        line.append("   then " if i == 0 else "  ", "dim").append_text(token(text))
        line.append(f" {percent(probability)}", "dim")
    return line
