"""Each figure: what is drawn is what the analysis has, words fit, and nothing of the user's is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import tiny
from loclin import figures
from loclin.analyses.explain import Explanation, explain
from loclin.analyses.layers import LayerExplanation, explain_layers
from loclin.errors import OptionError, OutputError
from loclin.linearization import Linearization, linearize
from loclin.results.files import write_bytes
from report.examples import HOSTILE, explanation, failed, token

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.text import Text  # noqa: E402

from loclin.figures import fonts  # noqa: E402
from loclin.figures.maps import shrink  # noqa: E402


@pytest.fixture(scope="module")
def lin() -> Linearization:
    return linearize(tiny.llama(dtype=torch.float32), tiny.prompt(5))


@pytest.fixture(scope="module")
def explained(lin) -> Explanation:
    return explain(lin, k=3)


@pytest.fixture(scope="module")
def layered(lin) -> LayerExplanation:
    return explain_layers(lin, k=4)


def lines(axes):
    return {line.get_label(): [list(side) for side in line.get_data()] for line in axes.lines}


def marks(figure, label):
    """The numbers along the axis with a label, from the first line to the last."""
    (axes,) = [axes for axes in figure.axes if axes.get_xlabel() == label]
    return [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize(("number", "name"), list(enumerate(figures.NAMES)))
def test_every_name_makes_a_file(number, name, lin, explained, layered, tmp_path):
    named = figures.NAMES[name]
    source = {"maps": lin, "explain": explained, "layers": layered}[named.source]
    path = tmp_path / f"out{named.suffixes[number % 3]}"
    getattr(figures, named.function)(source).save(path)
    held = path.read_bytes()
    starts = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml", ".tex": b"% needs", ".md": b"The", ".html": b"<!"}
    assert held.startswith(starts[path.suffix])
    if path.suffix == ".svg":
        assert ElementTree.fromstring(held).tag.endswith("svg")


def test_the_text_of_a_pdf_is_text_and_files_are_the_same_each_time(explained, tmp_path):
    figure, again = figures.figure_3(explained), tmp_path / "again.pdf"
    with matplotlib.rc_context({"pdf.compression": 0}):
        figure.save(tmp_path / "one.pdf")
    figure.save(again)
    assert (tmp_path / "one.pdf").read_bytes() == again.read_bytes()
    assert b"/FontFile2" in again.read_bytes()  # TrueType: no outlines


def test_figure_3_has_the_vectors(explained):
    drawn = lines(figures.figure_3([explained, explained]).axes[1])
    (frozen,) = [data for label, data in drawn.items() if label.startswith("frozen")]
    (ordinary,) = [data for label, data in drawn.items() if label.startswith("ordinary")]
    assert frozen == [explained.output, explained.reconstruction]
    assert ordinary == [explained.output, explained.ordinary]


def test_figures_4_5_and_a1_have_the_norms_and_the_singular_values(explained):
    rows = figures.figure_4a(explained, lines=2)
    for side in ("row", "column"):
        units = [unit.norm for token in explained.tokens for unit in getattr(token, f"{side}s")[:2]]
        assert marks(rows, f"norm of the {side}") == units
    for figure, count in ((figures.figure_4b(explained), 3), (figures.figure_a1(explained, lines=1), 1)):
        values = [b.values[0] for token in explained.tokens for b in token.blocks if b.indices[0] < count]
        assert marks(figure, "singular value") == values
        (spectra,) = [axes for axes in figure.axes if axes.get_xlabel() == "rank"]
        assert [line.get_ydata().tolist() for line in spectra.lines] == [t.singular_values for t in explained.tokens]
    block = explained.tokens[2].blocks[0]
    shown = texts(figures.figure_5([explained, explained]))
    for side in (block.reads, block.writes):
        assert any(text and "  ".join(word for word, _ in side).startswith(text) for text in shown)


def test_figure_6_has_spectra_path_and_ranks(layered):
    spectra, words, path, _, ranks, own = figures.figure_6(layered).axes
    assert [line.get_ydata().tolist() for line in spectra.lines] == layered.main.joint_spectra
    points = [line.get_xydata()[0].tolist() for line in path.lines[1:]]
    assert points == layered.main.path
    for axes, field in ((ranks, "joint_stable_rank"), (own, "joint_own_rank")):
        assert [line.get_ydata().tolist() for line in axes.lines] == [getattr(c, field) for c in layered.components]
    first = "  ".join(word for word, _ in layered.main.joint_vectors[-1][0].writes)
    assert first.startswith(words.texts[1].get_text())


def test_an_undefined_point_is_hollow(layered):
    main = replace(layered.main, path_defined=[False, *layered.main.path_defined[1:]])
    figure = figures.figure_6b(replace(layered, components=[main]))
    faces = {line.get_label(): line.get_markerfacecolor() for line in figure.axes[0].lines}
    assert faces["layer 0"] == "white"
    assert faces["layer 1"] != "white"


def test_figure_2_has_the_maps_of_growing_prompts(lin):
    figure = figures.figure_2(lin, steps=2)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    spectra = [axes.lines for axes in figure.axes if axes.lines]
    drawn = iter(images)
    for size, curves in zip((1, 2), spectra, strict=True):
        J = linearize(lin.model, lin.input_ids[:, :size]).jacobian()
        for i in range(size):
            torch.testing.assert_close(torch.tensor(next(drawn)), J.dense()[:, i])  # 24 x 24: a pixel for each entry
            torch.testing.assert_close(torch.tensor(curves[i].get_ydata()).float(), J.singular_values()[i])
    assert next(drawn, None) is None


def test_a_pixel_is_the_largest_entry_of_its_block():
    matrix = torch.zeros(1, 192, 192)
    matrix[0, 7, 100], matrix[0, 6, 101], matrix[0, 190, 3] = -5, 3, 2
    image = shrink(matrix)[0]
    assert image.shape == (96, 96)
    assert (image[3, 50], image[95, 1], image.abs().sum()) == (-5, 2, 7)


def test_the_settings_of_the_user_do_not_count_and_are_left(explained, tmp_path):
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 30, "pdf.fonttype": 3}):
        before = dict(matplotlib.rcParams)
        figure = figures.figure_3(explained)
        figure.save(tmp_path / "out.pdf")
        assert dict(matplotlib.rcParams) == before
    assert {label.get_fontsize() for label in figure.axes[0].get_xticklabels()} == {6.0}
    assert b"/Type3" not in (tmp_path / "out.pdf").read_bytes()
    style = tmp_path / "mine.mplstyle"
    style.write_text("axes.labelsize: 9\n")
    assert figures.figure_3(explained, style=style).axes[0].xaxis.label.get_fontsize() == 9


@pytest.mark.parametrize("width", [3.3, 6.75])
def test_words_stay_in_their_place(width):
    wide = token("W" * 40, 1.0)
    wide = replace(wide, blocks=[replace(b, writes=[("M" * 9, 1.0)] * 8, reads=[("W" * 99, 1.0)]) for b in wide.blocks])
    figure = figures.figure_4b(explanation([wide, token(HOSTILE, 0.5)]), width=width)
    for axes in figure.axes:
        for text in axes.texts:
            box, room = text.get_window_extent(), axes.get_window_extent()
            if text.get_text():
                assert box.x0 >= room.x0 - 12  # a panel's letter stands before it
                assert box.x1 <= room.x1 + 1, text.get_text()
    assert any(text.endswith("…") for text in texts(figure))
    assert figure._suptitle is None
    title = figure.axes[0]._left_title.get_window_extent()
    assert title.x1 <= figure.bbox.x1


def test_a_token_with_dollars_is_no_formula():
    assert any("$a$" in text for text in texts(figures.figure_4b(explanation([token("$a$", 1.0)]))))


def test_a_character_is_found_in_another_font(tmp_path):
    (stix,) = [font for font in fonts._others() if font[0] == "STIXGeneral"][:1]
    dejavu = fonts._characters(matplotlib.font_manager.findfont("DejaVu Sans"))
    others = [path for family, path in fonts._others() if family < stix[0] or "Sans" in family]
    only = fonts._characters(stix[1]) - dejavu - frozenset().union(*map(fonts._characters, others))
    character = chr(min(code for code in only if chr(code).isprintable()))
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        assert fonts.find_families(f"a{character}") == (["sans-serif", "STIXGeneral"], "")
    figure = figures.figure_4b(explanation([token(f"a{character}", 1.0)]))
    figure.save(tmp_path / "out.png")  # matplotlib would warn of a character without a font
    assert f"a{character}" in texts(figure)


def test_a_character_that_no_font_has_is_escaped_and_named(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "_others", list)
    figure = figures.figure_4b(explanation([token("\u4e2d\u56fd", 1.0)]))
    assert "\\u4e2d\\u56fd" in texts(figure)
    (warning,) = [warning for warning in figure.warnings if "font" in warning]
    assert "\u4e2d (U+4E2D)" in warning
    assert "\u56fd (U+56FD)" in warning
    figure.save(tmp_path / "out.svg")


def test_a_map_that_is_not_exact_is_said_to_be_none(layered):
    assert any("NOT EXACT" in text for text in texts(figures.figure_3(explanation(certificate=failed()))))
    assert any("NOT EXACT" in text for text in texts(figures.figure_6a(replace(layered, tolerance=0.0))))
    assert not any("NOT EXACT" in text for text in texts(figures.figure_6a(layered)))


def test_of_a_long_prompt_the_largest_shares_are_drawn():
    long = explanation([token(f"w{i}", float(i % 13)) for i in range(13)])
    figure = figures.figure_4b(long, lines=1)
    assert "w0" not in texts(figure)
    assert {f"w{i}" for i in range(1, 13)} <= set(texts(figure))
    assert any("12 of 13 tokens" in warning for warning in figure.warnings)


def test_mistakes_are_named(lin, explained, layered, tmp_path):
    with pytest.raises(OptionError, match="width=0.1"):
        figures.figure_3(explained, width=0.1)
    with pytest.raises(OptionError, match="lines of words need"):
        figures.figure_4b(explained, height=1.0)
    with pytest.raises(OptionError, match="too few for Figure 3"):
        figures.figure_3([explained] * 9, height=1.0)
    with pytest.raises(OptionError, match="mplstyle"):
        figures.figure_6(layered, style="absent")
    bad = tmp_path / "bad.mplstyle"
    bad.write_text("font.size: large-ish\n")
    with pytest.raises(OptionError, match="cannot be read"):
        figures.figure_6(layered, style=bad)
    with pytest.raises(OptionError, match="has 3 singular vectors"):
        figures.figure_4b(explained, lines=4)
    with pytest.raises(OptionError, match="nothing to draw"):
        figures.figure_3([])
    with pytest.raises(OptionError, match="too many"):
        figures.figure_2([linearize(lin.model, tiny.prompt(7))])
    with pytest.raises(OutputError, match=r"\.pdf, \.svg, \.png"):
        figures.figure_3(explained).save(tmp_path / "out.jpg")
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_save_leaves_the_file_as_it_was(explained, tmp_path, monkeypatch):
    path, figure = tmp_path / "out.png", figures.figure_3(explained)
    path.write_bytes(b"before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figure.save(path)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"out.png": b"before"}
    assert write_bytes.__module__ == "loclin.results.files"
