from __future__ import annotations

import io

import pytest
from rich.console import Console

from loclin.analyses.explain import Explanation
from loclin.report.table import Bar
from loclin.results.display import show

from .examples import certificate, explanation, failed, long, token


def printed(made: Explanation, width: int = 100, top: int = 3) -> str:
    out = io.StringIO()
    show(made, Console(file=out, width=width, force_terminal=True, color_system=None), top=top)
    return out.getvalue()


def test_says_what_the_explanation_says_in_order() -> None:
    text = printed(explanation())
    wanted = [
        "The◂sink ·bridge",
        "→ ·only 50.0 %",
        "·most 25.0 %",
        "EXACT reconstruction 4.0e-07, forward bit-identical, std 5.0e-07 (ordinary 1.1)",
        "+5.500",
        "-0.750",
        "+1.250",
        "bias",
        "+0.500",
        "total",
        "+6.500",
        "6.5",
        "rounding 2.0e-06",
        "σ1 2 writes",
        "v·x -0.125 reads",
        "σ2≈σ3 1…0.9995 writes near",
        "near-equal reads",
        "row 17 1.75 reads",
        "column 3 1.125 writes",
        "[bold]the first word <i>carries</i> the sink",
        "tiny · float32 · gate activation",
    ]
    at = 0
    for piece in wanted:
        found = text.find(piece, at)
        assert found >= 0, f"{piece!r} is not there, or not in its place"
        at = found + len(piece)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_fits_the_terminal_and_tokens_are_not_markup(width: int) -> None:
    text = printed(explanation(), width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "</script><b·onmouse" in text


def test_a_zero_map_is_named() -> None:
    text = printed(explanation())
    assert text.count("the map is zero") == 3


def test_top_limits_the_blocks() -> None:
    assert "σ2≈σ3" not in printed(explanation(), top=1)


def test_failure_names_the_errors_and_the_culprits() -> None:
    text = printed(explanation(certificate=failed()))
    assert "NOT EXACT reconstruction 0.3, forward 2.0e-03" in text
    assert "reconstruction error 0.3 is beyond 3.0e-06" in text
    assert "forward error 2.0e-03 is beyond 0" in text
    assert "layers.3.mlp.act_fn ([bold]Odd) is not linear: error 0.37" in text
    assert "adjoint" not in text


def test_a_number_that_is_not_one_fails() -> None:
    text = printed(explanation(certificate=certificate(adjoint_error=float("nan"))))
    assert "adjoint error nan is beyond" in text


def test_bars_point_the_way_of_the_sign() -> None:
    assert str(Bar(1.0)) == "     │█████"
    assert str(Bar(-0.5)) == "  ▐██│     "
    assert str(Bar(0.0)) == "     │     "
    assert str(Bar(3.0)) == "     │████▶"
    assert str(Bar(-3.0)) == "◀████│     "


def test_a_long_prompt_is_collapsed_and_says_so() -> None:
    made = long(300)
    text = printed(made)
    assert "… 180 more tokens …" in " ".join(text.split())
    assert "above: the 40 largest" in text
    assert text.count("the 12 of 300 tokens with the largest |share|") == 2
    rest = sum(part.share for part in made.tokens[:260])
    assert f"260 others {rest:+.3f}" in " ".join(text.split())
    assert "·w299" in text
    assert len(text.splitlines()) < 250


def test_one_token() -> None:
    assert "total" in printed(explanation([token("a", 1.0, is_sink=True)]))
    assert "the map is zero" in printed(explanation([token("a", 0.0, zero=True)]))
