from __future__ import annotations

import pytest

from loclin.report.text import error, percent, sigmas, signed, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b", "·a·b"),
        ("\n\t", "↵⇥"),
        ("", "∅"),
        ("·↵", r"\xb7\u21b5"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202e", r"\u202e"),
        ("\ud800", r"\ud800"),
        ("日本", "日本"),
    ],
)
def test_whitespace_is_drawn_and_what_does_not_print_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_long_token_is_cut() -> None:
    assert visible("-" * 40, 10) == "-" * 9 + "…"


def test_numbers() -> None:
    assert [signed(x) for x in (0.0, 1.25, -0.75, -4e-5)] == ["+0.000", "+1.250", "-0.750", "-4e-05"]
    assert [error(x) for x in (0.0, 4.66e-7, 1.13, float("nan"))] == ["0", "4.7e-07", "1.1", "nan"]
    assert percent(0.0749) == "7.5 %"


def test_near_equal_values_share_a_name() -> None:
    assert sigmas([0]) == "σ1"
    assert sigmas([2, 3]) == "σ3≈σ4"
    assert sigmas([2, 3, 4, 5]) == "σ3≈…≈σ6"


def test_names_of_bytes_and_of_ids_stay_whole():
    assert visible(" ⟨F0 9F⟩") == "·⟨F0 9F⟩"
    assert visible("⟨unused 7⟩⟨empty 8⟩ ⟨F0 x⟩") == "⟨unused 7⟩⟨empty 8⟩·⟨F0·x⟩"


def test_an_accent_alone_stands_on_a_circle():
    assert visible("\u0301") == "◌\u0301"
    assert visible("e\u0301") == "e\u0301"
    assert visible("◌") == "\\u25cc"
