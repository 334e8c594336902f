from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import pytest
from rich.console import Console

import tiny
from loclin.analyses.decode import SingularBlock
from loclin.analyses.layers import ComponentLayers, LayerExplanation, explain_layers
from loclin.linearization import linearize
from loclin.report.layers_page import depth_colour
from loclin.report.text import number, sigmas, signed, visible
from loclin.results import display
from loclin.results.display import fragment, show

from .examples import HOSTILE
from .test_page import Page, numbers

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def found() -> LayerExplanation:
    made = explain_layers(linearize(tiny.llama(), tiny.prompt(5), precision="double"), k=3)
    target = made.target | {"text": HOSTILE}
    texts = [HOSTILE, *made.tokens[1:]]
    origin = replace(made.provenance, tokens=texts, text=HOSTILE)
    return replace(made, tokens=texts, provenance=origin, target=target, warnings=["<i>careful"])


@pytest.fixture(scope="module")
def page(found: LayerExplanation) -> Page:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loclin.report.html.plotly_script", lambda: "/* plotly */")
        return Page(display.page(found))


def test_figures_hold_the_numbers(page: Page, found: LayerExplanation) -> None:
    figures = page.data["figures"]
    spectra = [trace for trace in figures["spectra"]["data"] if trace["meta"] == "mlp_out"]
    for trace, values in zip(spectra, found.components[1].joint_spectra, strict=True):
        assert numbers(trace["y"]) == pytest.approx(values)
    (path,) = [trace for trace in figures["path"]["data"] if trace["visible"]]
    assert [list(point) for point in zip(path["x"], path["y"], strict=True)] == found.main.path
    for name, field in (("ranks", "joint_stable_rank"), ("own", "joint_own_rank")):
        joint = [trace for trace in figures[name]["data"] if not trace["meta"]["chosen"]]
        for trace, component in zip(joint, found.components, strict=True):
            assert numbers(trace["y"]) == pytest.approx(getattr(component, field))
    lens, *_ = figures["depth"]["data"]
    assert list(lens["y"]) == [layer.rank for layer in found.lens]


def test_the_table_holds_every_token_and_component(page: Page, found: LayerExplanation) -> None:
    for shown, component in zip(page.data["components"], found.components, strict=True):
        assert [len(layers) for layers in shown["tokens"]] == [found.n_layers] * 5
        assert len(shown["joint"]) == found.n_layers
        assert shown["rank"] == [number(rank) for rank in component.joint_stable_rank]
        for of, blocks in (
            (shown["tokens"][2][1], component.token_vectors[1][2]),
            (shown["joint"][1], component.joint_vectors[1]),
        ):
            assert len(of) == len(blocks)
            for (name, _, _, *sides), block in zip(of, blocks, strict=True):
                assert name == sigmas(block.indices)
                for side, words in zip(sides, (block.writes, block.reads), strict=True):
                    assert [page.data["words"][index] for index in side[::2]] == [visible(w, 24) for w, _ in words]
                    assert side[1::2] == pytest.approx([score for _, score in words], rel=1e-2)
        assert shown["own"][3] == pytest.approx([ranks[3] for ranks in component.token_own_rank], rel=1e-4)
    assert [lens["rank"] for lens in page.data["lens"]] == [layer.rank for layer in found.lens]
    assert "EXACT" in page.text


def many_tokens(found: LayerExplanation, length: int, layers: int) -> LayerExplanation:
    """An explanation as of a model with so many layers, at a prompt with so many tokens."""
    random = np.random.default_rng(0)
    vocabulary = [f"word{number}" for number in random.integers(10**6, size=20_000)]

    def block(index: int) -> SingularBlock:
        sides = [
            [(vocabulary[i], score) for i, score in zip(random.integers(20_000, size=5), row, strict=True)]
            for row in random.random((2, 5))
        ]
        return SingularBlock([index], [float(random.random())], *sides, float(random.normal()))

    blocks = [[block(index) for index in range(3)] for _ in range(2000)]
    ranks = random.random((layers, length)).tolist()

    def component(one: ComponentLayers) -> ComponentLayers:
        vectors = [[blocks[i] for i in random.integers(2000, size=length)] for _ in range(layers)]
        more = {
            field.name: (getattr(one, field.name) * layers)[:layers] for field in fields(one) if field.name != "name"
        }
        return replace(one, **more | {"token_vectors": vectors, "token_stable_rank": ranks, "token_own_rank": ranks})

    return replace(
        found,
        tokens=[f"token{i}" for i in range(length)],
        provenance=replace(found.provenance, position=length - 1, tokens=[f"token{i}" for i in range(length)]),
        components=[component(one) for one in found.components],
        lens=(found.lens * layers)[:layers],
    )


@pytest.mark.long
@pytest.mark.parametrize(("length", "first"), [(1000, 445)])
def test_a_page_of_many_tokens_stays_small_and_says_what_it_leaves_out(
    found: LayerExplanation, monkeypatch: pytest.MonkeyPatch, length: int, first: int
) -> None:
    monkeypatch.setattr("loclin.report.html.plotly_script", lambda: "/* plotly */")
    large = many_tokens(found, length, 30)
    html = display.page(large)
    assert len(html.encode()) < 6e6  # 34 MB when all of 500 tokens is written out
    page = Page(html)
    assert not page.data["scored"]
    for shown, component in zip(page.data["components"], large.components, strict=True):
        assert [i for i, layers in enumerate(shown["tokens"]) if layers is None] == list(range(first))
        for layer in (0, 29):
            ((name, _, gain, writes, _),) = shown["tokens"][-1][layer]
            block = component.token_vectors[layer][-1][0]
            assert (name, gain) == ("σ1", signed(block.gain or 0.0))
            assert [page.data["words"][index] for index in writes] == [word for word, _ in block.writes[:3]]
        assert len(shown["joint"][3]) == len(component.joint_vectors[3])
    assert "first vector and 3 words a side, without scores" in page.text
    assert (f"tokens 0 to {first - 1} nothing" in page.text) == (first > 0)
    assert "loclin layers --json" in page.text


def test_a_page_of_few_tokens_leaves_nothing_out(page: Page) -> None:
    assert page.data["scored"]
    assert "keep the page small" not in page.text


def test_loads_nothing_and_runs_nothing_from_a_prompt(page: Page) -> None:
    assert len(page.scripts) == 3
    for tag, attributes in page.elements:
        assert not {"src", "href"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")]
        assert tag not in ("link", "iframe", "object", "embed", "base", "b onmouseover")
    assert page.having("http-equiv", "Content-Security-Policy")
    assert "<i>careful" in page.text


def test_labels_belong_to_elements(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert {name for name in page.data["figures"]} <= set(ids)


def test_depth_goes_from_the_first_colour_to_the_last() -> None:
    assert (depth_colour(0, 5), depth_colour(2, 5), depth_colour(4, 5)) == ("#3b82f6", "#a855f7", "#ea6a12")
    assert depth_colour(0, 1) == "#3b82f6"


def test_the_fragment_is_static(found: LayerExplanation) -> None:
    piece = Page(fragment(found) or "")
    assert not piece.scripts
    assert len([tag for tag, _ in piece.elements if tag == "tr"]) == found.n_layers + 1
    assert found._repr_html_() == fragment(found)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_terminal(found: LayerExplanation, width: int) -> None:
    out = io.StringIO()
    show(found, Console(file=out, width=width, force_terminal=True, color_system=None))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "EXACT largest reconstruction error of 18 maps" in " ".join(text.split())
    wrong = replace(found, tolerance=0.0)
    show(wrong, Console(file=out, width=width, force_terminal=True, color_system=None))
    assert "NOT EXACT" in out.getvalue()
