"""Which installed font has a character."""

from __future__ import annotations

from functools import cache

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

_NO_TEXT = ("Last Resort", "cm", "STIXSize", "STIXNonUnicode")
"""Families that have boxes for everything, or other characters than their codes say."""


@cache
def _characters(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


@cache
def _others() -> list[tuple[str, str]]:
    """The upright fonts that are installed, as (family, path): those without serifs first."""
    fonts = {
        (font.name, font.fname)
        for font in fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular") and not font.name.startswith(_NO_TEXT)
    }
    return sorted(fonts, key=lambda font: ("Sans" not in font[0], font))


def find_families(text: str) -> tuple[list[str], str]:
    """Find font families in which a text can be written, and the characters that no installed font has.

    The families are those of the look in force, and others for the characters that these lack.
    """
    families, missing = list(matplotlib.rcParams["font.family"]), ""
    own = _characters(str(findfont(FontProperties(family=families))))
    for character in dict.fromkeys(text.replace("\n", "")):
        if ord(character) in own:
            continue
        found = next((family for family, path in _others() if ord(character) in _characters(path)), None)
        if found is None:
            missing += character
        elif found not in families:
            families.append(found)
    return families, missing
