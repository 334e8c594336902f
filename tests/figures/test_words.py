"""The tables of words: every cell is the analysis', and no word is read as markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import tiny
from loclin import figures
from loclin.analyses.decode import SingularBlock
from loclin.analyses.layers import LayerExplanation, explain_layers
from loclin.errors import OptionError, OutputError
from loclin.figures.given import layered
from loclin.linearization import linearize
from loclin.report.text import visible
from report.examples import HOSTILE
from report.test_page import Page

WORDS = [" Bridges", "bridge", HOSTILE, "a_b|c\\", " only"]


@pytest.fixture(scope="module")
def found() -> LayerExplanation:
    return explain_layers(linearize(tiny.llama(dtype=torch.float32), tiny.prompt(4)), k=3, components=["resid_post"])


@pytest.fixture
def hostile(found) -> LayerExplanation:
    """The same with words that mean something in every form of the table."""
    block = SingularBlock([0, 1], [1.0, 0.9999], [(word, 1.0) for word in WORDS], [], None)
    single = SingularBlock([2], [0.5], [(" a", 1.0)], [], 0.5)
    main = replace(found.main, token_vectors=[[[block, single]] * 4] * found.n_layers)
    return replace(found, components=[main], target=found.target | {"text": " only"}, warnings=["50 % & <more>"])


def test_cells_are_the_words_of_the_vectors(found):
    table = figures.table_5(found, layers=range(3))
    assert [(row.layer, row.vector) for row in table.rows] == [(i, f"u{j}") for i in range(3) for j in (1, 2, 3)]
    for row in table.rows:
        for token, cell in enumerate(row.cells):
            blocks = found.main.token_vectors[row.layer][token]
            expected = [b.writes for b in blocks if b.indices[0] == int(row.vector[1]) - 1]
            assert cell == [visible(word) for word, _ in (expected[0] if expected else [])]


def test_layers_begin_where_the_predicted_word_appears(found):
    for first, layers in ((0, {0, 1, 2}), (1, {1, 2}), (None, {0, 1, 2})):
        there = replace(found, appears=found.appears | {"resid_post joint": first})
        assert {row.layer for row in figures.table_5(there).rows} == layers
        assert {row.layer for row in figures.table_1(there).rows} == {0, 1, 2}


def test_spellings_of_a_highlighted_word_are_marked_and_near_equal_vectors_share_a_row(hostile):
    table = figures.table_1(hostile, highlight=["BRIDGE", " only"])
    assert [table.mark(word) for word in table.rows[0].cells[0]] == [0, 0, None, None, 1]
    assert table.rows[1].cells[0] == []
    assert table.rows[2].cells[0] == ["·a"]
    assert figures.table_1(hostile).legend[0] == "·only"
    assert "·Bridges" in figures.table_1(hostile).legend


def test_no_word_is_markup(hostile):
    table = figures.table_1(hostile, layers=[1])
    page = Page(table.html())
    assert not page.scripts
    assert not [name for tag, _ in page.elements for name in [tag] if tag in ("b", "more")]
    assert page.text.count("a_b|c\\") >= 4
    assert len([tag for tag, _ in page.elements if tag == "mark"]) >= 12
    rows = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {6}
    latex = table.latex()
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    body = latex.split(r"\endhead")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 3
    for line in body:
        assert line.endswith(r"\\")
        assert len(re.findall(r"(?<!\\)&", line)) == 4
        assert not re.search(r"(?<!\\)[%$#_]", line)
    assert r"\colorbox{loclin0}{·only}" in body[0]
    assert r"a\_b\textbar{}c\textbackslash{}" in body[0]


def test_mistakes_are_named(found, tmp_path):
    with pytest.raises(OptionError, match="layer=3"):
        figures.table_1(found, layers=[3])
    with pytest.raises(OptionError, match="at most 6"):
        figures.table_1(found, highlight=list("abcdefg"))
    with pytest.raises(OptionError, match="explain_layers"):
        layered(found.main)
    with pytest.raises(OutputError, match=r"\.tex, \.md, \.html"):
        figures.table_1(found).save(tmp_path / "out.pdf")
    assert not list(tmp_path.iterdir())


def test_it_shows_itself_in_a_notebook(found):
    assert figures.table_1(found)._repr_html_() == figures.table_1(found).html()
