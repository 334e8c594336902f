"""An attribution on a terminal and as HTML says its numbers, and nothing in it is markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loclin.analyses.attribution.result import Attribution
from loclin.report.text import visible
from loclin.results.display import fragment, page, show

from . import attributions
from .examples import HOSTILE
from .test_page import Page

LEVELS = [attributions.tokens(), attributions.layers(), attributions.heads(), attributions.matrix()]
NAMES = ["token", "layer", "head", "matrix"]


def printed(found: Attribution, width: int = 110, top: int = 20) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    show(found, console, top=top)
    return out.getvalue()


def in_order(text: str, *wanted: str) -> None:
    at = 0
    for piece in wanted:
        found = text.find(piece, at)
        assert found >= 0, f"{piece!r} is not there, or not in its place"
        at = found + len(piece)


def test_tokens_on_a_terminal() -> None:
    text = printed(attributions.tokens())
    in_order(text, "<s>◂sink", "logit ·Bridge 12.88   probability 50.0 %", "Tokens", "<s>◂sink", "+9.500", "████▶")
    in_order(text, "1 ·The", "-0.750", "3 ·Gate◂last", "+2.500", "2 biases", "+0.375")
    in_order(
        text, "6 shares sum to 12.875, the logit is 12.875: residual 2.0e-06, or 1.4e-07 of the sizes of what is summed"
    )
    assert "tiny · float32 · gate activation · precision stock · position 3" in text


def test_layers_on_a_terminal() -> None:
    rows = " ".join(printed(attributions.layers()).split())
    in_order(
        rows, "0 +1.500", "-2.000", "+3.000 -4.000", "1 +0.250", "+4.000", "+0.500 +8.000 ·left", "embedding +0.500"
    )
    in_order(rows, "bias +0.125", "6 shares sum to 4.375")


def test_heads_on_a_terminal() -> None:
    rows = " ".join(printed(attributions.heads(), top=2).split())
    in_order(rows, "L1H2 +4.000", "+8.000", "L0H2 +3.000")
    in_order(rows, "embedding +0.500", "4 other heads -2.000", "2 biases +0.125", "2 MLPs +2.000", "11 shares sum to")
    in_order(rows, "through: all of it that passes there", "warning", "[bold]whole in layers 1")
    assert f"{visible(HOSTILE, 20)} +3.000" in " ".join(printed(attributions.heads(), 160).split())


def test_tokens_by_layers_on_a_terminal() -> None:
    rows = " ".join(printed(attributions.matrix()).split())
    in_order(rows, "attn_out.0 +1.000", "·Gate", "norm.bias +0.500", "attn_out.0 +0.125", "biases", "25 shares sum to")


@pytest.mark.parametrize("width", [40, 60, 90, 120])
@pytest.mark.parametrize("found", LEVELS, ids=NAMES)
def test_fits_the_terminal(found: Attribution, width: int) -> None:
    text = printed(found, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width


def test_the_page_has_every_level_and_no_scripts() -> None:
    every = Page(page(LEVELS))
    assert not every.scripts
    assert not [name for _, attributes in every.elements for name in attributes if name.startswith("on")]
    for tag, attributes in every.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img"), tag
        assert "src" not in attributes
        assert "href" not in attributes
    (policy,) = every.having("http-equiv", "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    text = " ".join(every.text.split())
    levels = ("Tokens", "Layers", "Heads", "Tokens × layers")
    in_order(text, "·Bridge", "logit ·Bridge 12.88 probability 50.0 %", *levels, "llama")
    assert text.count("shares sum to") == 4
    assert visible(HOSTILE) in every.text


def test_chips_are_coloured_by_share_and_marked() -> None:
    chips = Page(page([attributions.tokens()])).having("class", "chip")
    assert [("sink" in (chip["class"] or ""), "last" in (chip["class"] or "")) for chip in chips] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert "neg" in (chips[1]["class"] or "")
    assert chips[3]["style"] == "--a:0.78", "the largest share of a word is in full colour"
    assert "share -0.750" in (chips[1]["title"] or "")


def test_heat_maps_hold_the_shares() -> None:
    heads = Page(page([attributions.heads()]))
    cells = {a["title"]: a for _, a in heads.elements if "title" in a and "H" in (a["title"] or "")[:4]}
    assert cells["L1H2: +4.000"]["style"] == "--a:1.00"
    assert cells["L1H1: -3.000"]["class"] == "shade neg"
    both = Page(page([attributions.matrix()]))
    titles = [a["title"] or "" for _, a in both.elements if " → " in (a.get("title") or "")]
    assert len(titles) == 5 * 6
    assert "3 ·Gate (last) → mlp_out.1: +1.000" in titles
    assert "biases → bias: +0.500" in titles


def test_long_prompts_are_summed_up() -> None:
    text = " ".join(Page(page([attributions.matrix(200)])).text.split())
    assert "120 others" in text


@pytest.mark.parametrize("found", LEVELS, ids=NAMES)
def test_the_fragment_is_static_and_escaped(found: Attribution) -> None:
    piece = Page(fragment(found) or "")
    assert not piece.scripts
    assert not [tag for tag, _ in piece.elements if tag in ("html", "body", "button")]
    assert visible(HOSTILE) in piece.text
    assert found._repr_html_() == fragment(found)


def test_a_clipped_bar_says_so():
    html = page([attributions.tokens()])
    assert html.count('class="pos beyond"') == 1  # the sink's, which would dwarf all others
    assert "end: longer than drawn." in html
    unclipped = page([attributions.tokens(sinks=[])])
    assert ' beyond"' not in unclipped
    assert "longer than drawn" not in unclipped


def test_a_clipped_cell_says_so():
    rows: list[attributions.Row] = [("attn_out", 0, -1, i, share) for i, share in enumerate((9.5, -0.75, 1.25, 2.5))]
    html = page([attributions.made("token×layer", rows)])
    assert html.count('class="shade beyond"') == 1
    assert "Full colour: 2.500; outlined: more." in html
    assert "outlined" not in page([attributions.made("token×layer", rows, sinks=[])])


def test_pages_and_terminals_name_the_gate_and_the_target():
    for found in (attributions.tokens(), attributions.layers(), attributions.heads(), attributions.matrix()):
        html = page([found])
        assert "Gate activation. Another gate gives other shares; half agrees best with removing tokens" in html
        assert "Gate activation." in (fragment(found) or "")
        assert "the logit is" in html
