"""Tokens and numbers as text that a person can read, the same on a terminal and on a page."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loclin.maps.certificate import Check

SPACE, NEWLINE, TAB, EMPTY, CARRIER = "·", "↵", "⇥", "∅", "◌"
_NAMED = re.compile(r"(⟨(?:[0-9A-F]{2}(?: [0-9A-F]{2})*|(?:unused|empty) \d+)⟩)")
"""Bytes, and ids without a text, as `loclin.models.tokens` writes them: no space in them is the token's."""
MARKS = {" ": SPACE, "\n": NEWLINE, "\t": TAB}
COMPONENTS = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}


def visible(text: str, limit: int | None = None) -> str:
    """Draw a token's whitespace, and leave nothing in it that could act on a terminal or reorder a line.

    Characters that do not print, and the marks themselves, are written as Python escapes, so that a mark
    always means what it stands for. An accent without its letter stands on a dotted circle.

    Parameters
    ----------
    text
        A token's text.
    limit
        The most characters to show; longer tokens end in an ellipsis.
    """
    parts = _NAMED.split(text)  # every second one is such a name
    shown = "".join(part if i % 2 else "".join(map(_drawn, part)) for i, part in enumerate(parts)) or EMPTY
    shown = CARRIER + shown if unicodedata.category(shown[0]).startswith("M") else shown
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _drawn(character: str) -> str:
    return MARKS.get(character) or (character if _plain(character) else _escaped(character))


def _plain(character: str) -> bool:
    return character.isprintable() and character not in (SPACE, NEWLINE, TAB, EMPTY, CARRIER)


def _escaped(character: str) -> str:
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


def gate_note(gate: object) -> str:
    """Say which of several exact sets of shares is shown."""
    agrees = "half agrees best with removing tokens (docs/faithfulness.md)"
    if gate == "half":
        return f"Gate {agrees}; another gate gives other shares."
    return f"Gate {gate}. Another gate gives other shares; {agrees}."
