from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from loclin.analyses.explain import Explanation
from loclin.errors import MissingExtraError
from loclin.report.explanation_page import SPECTRUM_POINTS
from loclin.report.html import asset, embedded
from loclin.report.plot import NEGATIVE, POSITIVE, plotly_script
from loclin.report.text import visible
from loclin.results import display

from .examples import HOSTILE, certificate, explanation, failed, long, token

pytest.importorskip("plotly")


class Page(HTMLParser):
    """A page taken apart: its elements, the text outside scripts and styles, and the embedded data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._raw = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if self._raw == "script":
            self.scripts.append("")

    def handle_endtag(self, _tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.text += data

    def having(self, name: str, value: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if value in (attributes.get(name) or "").split()]

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def numbers(field: Any) -> list[float]:
    """A plotly array, which may be packed."""
    if isinstance(field, dict):
        return np.frombuffer(base64.b64decode(field["bdata"]), dtype=field["dtype"]).tolist()
    return list(field)


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """Leave plotly's own five megabytes out of the pages, to take them apart quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loclin.report.html.plotly_script", lambda: "/* plotly */")
        yield


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(display.page(explanation()))


def test_shows_the_numbers_of_the_explanation(page: Page) -> None:
    text = " ".join(page.text.split())
    for piece in ("is next with 50.0 %", "logit over the mean 6.5 = tokens +6.000, bias +0.500, rounding 2.0e-06"):
        assert piece in text
    for piece in ("EXACT", "4.0e-07", "bit-identical", "at most", "ordinary Jacobian"):
        assert piece in text
    made = explanation()
    for shown, part in zip(page.data["tokens"], made.tokens, strict=True):
        assert shown["text"] == visible(part.text)
        assert dict(shown["facts"])["share of the logit over the mean"] == f"{part.share:+.3f}"
        assert len(shown["blocks"]) == len(part.blocks)
    block = page.data["tokens"][1]["blocks"][1]
    assert (block["name"], block["values"], block["gain"]) == ("σ2≈σ3", "1, 0.9995", None)
    assert page.data["tokens"][1]["blocks"][0]["writes"] == [["·left", 0.9], ["right", 0.4], ["↵", -0.1]]
    assert page.data["tokens"][1]["rows"][0] == {"index": 17, "norm": "1.75", "words": [["drives", 0.3]]}


def test_figures_hold_the_numbers_of_the_explanation(page: Page) -> None:
    made, figures = explanation(), page.data["figures"]
    (bars,) = figures["shares"]["data"]
    assert numbers(bars["y"]) == [*(part.share for part in made.tokens), made.bias_share]
    assert bars["marker"]["color"][:2] == [POSITIVE, NEGATIVE]
    assert bars["marker"]["pattern"]["shape"] == ["/", "", "", "", ""]
    _, ordinary, frozen = figures["scatter"]["data"]
    assert numbers(frozen["x"]) == sorted(made.output)
    assert sorted(numbers(ordinary["y"])) == sorted(made.ordinary)
    assert frozen["name"].endswith("5.0e-07")
    assert ordinary["name"].endswith("1.1")
    spectra = figures["spectra"]["data"]
    assert [trace["meta"] for trace in spectra] == [0, 1, 2], "a zero map has no spectrum"
    assert np.allclose(numbers(spectra[0]["y"]), [1.0, 0.5, 0.49975, 0.25, 0.125])


def test_a_hostile_token_is_only_text(page: Page) -> None:
    assert len(page.scripts) == 3
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert visible(HOSTILE) in page.text
    assert page.data["tokens"][2]["text"] == visible(HOSTILE)
    (bars,) = page.data["figures"]["shares"]["data"]
    assert "&lt;/script&gt;" in bars["hovertext"][2]
    names = page.data["figures"]["shares"]["layout"]["xaxis"]["ticktext"]
    assert not set("<%$") & set("".join(names)), "nothing that plotly would interpret"
    assert "[bold]the first word <i>carries</i> the sink" in page.text


def test_embedded_json_cannot_end_its_element() -> None:
    text = embedded({"a": "</script><!--&\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--&\u2028"}


def test_loads_nothing_from_anywhere(page: Page) -> None:
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert "href" not in attributes, tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
    (policy,) = page.having("http-equiv", "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert "@import" not in page.text
    assert "url(" not in asset("page.css", "parts.css", "notebook.css")


def test_chips_choose_tokens_and_mark_the_sink(page: Page) -> None:
    chips = page.having("class", "chip")
    assert [chip["data-token"] for chip in chips] == ["0", "1", "2", "3"]
    assert [("sink" in (chip["class"] or "")) for chip in chips] == [True, False, False, False]
    assert "neg" in (chips[1]["class"] or "")
    assert "share -0.750" in (chips[1]["title"] or "")
    assert page.data["selected"] == 2, "the largest share of a word, the sink aside"


def test_labels_belong_to_elements(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        assert not (attributes.get("role") == "img" and not attributes.get("aria-label"))


def test_a_failed_certificate_names_the_culprits() -> None:
    text = Page(display.page(explanation(certificate=failed()))).text
    assert "NOT EXACT" in text
    assert "layers.3.mlp.act_fn ([bold]Odd) is not linear: error 0.37" in text


def test_one_token_and_a_zero_map() -> None:
    for made in (explanation([token("a", 1.0)]), explanation([token("a", 0.0, zero=True)])):
        assert len(Page(display.page(made)).data["tokens"]) == 1


def test_a_number_that_is_not_one_does_not_break_the_page() -> None:
    made = explanation(certificate=certificate(adjoint_error=float("nan")))
    assert "nan" in Page(display.page(made)).text


@pytest.mark.slow
def test_a_long_prompt_has_few_visible_curves_and_thin_ones() -> None:
    values = [2.0 ** -(i / 50) for i in range(500)]
    made = long(512)
    for part in made.tokens:
        part.singular_values[:] = values
    page = Page(display.page(made))
    traces = page.data["figures"]["spectra"]["data"]
    assert sum(trace["visible"] is True for trace in traces) == 6
    assert sum(len(numbers(trace["x"])) for trace in traces) <= SPECTRUM_POINTS
    assert numbers(traces[0]["x"])[0] == 1
    assert numbers(traces[0]["x"])[-1] == 500
    assert "thinned to about 78 of 500 points" in page.text


def test_without_plotly_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r'pip install "loclin\[html\]"'):
        display.page(explanation())


def test_plotly_is_whole_and_cannot_end_its_element() -> None:
    script = plotly_script()
    assert "newPlot" in script
    assert "</script" not in script.lower()


@pytest.mark.parametrize("made", [explanation(), explanation([token("a", 0.0, zero=True)]), long(100)])
def test_the_fragment_is_static_and_escaped(made: Explanation) -> None:
    fragment = Page(display.fragment(made) or "")
    assert not fragment.scripts
    assert not [tag for tag, _ in fragment.elements if tag in ("html", "body", "button")]
    assert not [name for _, attributes in fragment.elements for name in attributes if name.startswith("on")]
    assert len(fragment.having("class", "chip")) == len(made.tokens)
    assert f"{made.target['value']:.4g}" in fragment.text
    assert ("others" in fragment.text) == (len(made.tokens) > 24)
