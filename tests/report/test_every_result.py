"""Every result has a form on a terminal, as a page and in a notebook, and nothing of a prompt is markup in any."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from rich.console import Console

import loclin
import tiny
from loclin.analyses.coverage.result import Coverage, FamilyResult, Run
from loclin.analyses.estimate import AnalysisEstimate
from loclin.analyses.faithfulness.disruption import ItemResult
from loclin.analyses.faithfulness.study import Faithfulness, PromptResult
from loclin.common.rehearsal import Cost, Rates
from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized
from loclin.report.sheet import describe
from loclin.reproduction.result import Compared, Grid, Target
from loclin.results import display
from loclin.results.result import Result
from loclin.spectral import SVD
from loclin.steering.search import Sweep, Trial
from loclin.steering.steer import Steered
from loclin.steering.watch import Effect, Hit, TokenShare, Watched
from loclin.steering.writing import Continuation

from . import attributions, examples
from .examples import HOSTILE
from .test_page import Page

pytest.importorskip("plotly")
VERSIONS = {"loclin": "0.1.0"}


@cache
def lin() -> loclin.Linearization:
    return loclin.linearize(tiny.llama(), tiny.prompt(4), precision="double")


def hostile(result: Any, **changes: Any) -> Any:
    """The result as of another prompt, and with a warning."""
    texts = [f"{HOSTILE}\x1b[31m"] * len(result.provenance.tokens)
    origin = replace(result.provenance, tokens=texts, text=texts[0])
    return replace(result, provenance=origin, warnings=[HOSTILE], **changes)


def generation() -> loclin.Generation:
    steps = [examples.explanation(), examples.explanation()]
    steps[1].target["text"] = HOSTILE
    moved = loclin.generate(lin(), 2, k=1).drift[0]
    return loclin.Generation(HOSTILE, steps, [moved], steps[0].provenance, steps[0].warnings)


def steered() -> Steered:
    written = Continuation(HOSTILE, [1], False, 1.0, 0.0, 5.0)
    trials = [Trial(layer, strength, 1.0, 0.5, written) for layer in (0, 1) for strength in (0.1, 1.0)]
    return Steered(
        prompt=HOSTILE,
        toward=[HOSTILE],
        words=["script", HOSTILE],
        method="operator",
        layer=1,
        strength=1.0,
        form="add",
        normal=written,
        steered=replace(written, ended=True),
        gain=1.0,
        kl=0.5,
        sweep=Sweep("add", trials, trials[0], 2.0, -3.0),
        provenance=examples.provenance([HOSTILE], target="resid_post.1"),
        settings={"rank": None},
        warnings=[HOSTILE],
    )


def watched() -> Watched:
    written = Continuation(HOSTILE, [1], False, 1.0, 0.0, 5.0)
    return Watched(
        words=[HOSTILE],
        hits=[Hit(0, HOSTILE, 1, 2.0, 0.5, [HOSTILE, "b"], [HOSTILE])],
        shares=[TokenShare(HOSTILE, 0.5, 3.0, 1.5, 0.25, True)],
        here=Effect(-1.0, 0.5, 1),
        elsewhere=None,
        normal=written,
        without=written,
        searched=8,
        provenance=examples.provenance([HOSTILE]),
        settings={"k": 8},
        warnings=[HOSTILE],
    )


def coverage() -> Coverage:
    runs = [Run("float32", "activation", "refused", module=HOSTILE, reason=HOSTILE)]
    return Coverage(VERSIONS, "", [FamilyResult(f"{HOSTILE}\x1b", HOSTILE, None, runs)])


def study() -> Faithfulness:
    shares = {name: [0.1, 0.2, 0.3, 0.5] for name in ("frozen/half/centred/zero", HOSTILE)}
    effects = {name: [0.3, 0.1, 0.2, 0.4] for name in ("removed", "replaced")}
    curves = {test: {HOSTILE: [0.1]} for test in ("first", "last", "first, all")}
    found = PromptResult(HOSTILE, "a", "held-out", ["a", "b", "c", "d"], [], "d", 0.5, shares, effects, curves)
    return Faithfulness({"model": {"name": HOSTILE}}, VERSIONS, [found])


def disrupted() -> loclin.Disruption:
    scores = {name: [0.1, 0.2, 0.3] for name in ("frozen/half/centred", "occlusion", HOSTILE)}
    logits, areas = {"logit": 1.0, "centred": 2.0}, {name: [90.0, 20.0] for name in scores}
    found = ItemResult(HOSTILE, HOSTILE, HOSTILE, True, [HOSTILE] * 3, [1, 2], 0.5, logits, scores, areas)
    return loclin.Disruption({"model": {"name": HOSTILE}}, VERSIONS, [found])


def exploration() -> loclin.Exploration:
    made = hostile(lin().explore(count=9))
    rows = [replace(row, name=HOSTILE) for row in made.rows]
    return replace(made, rows=rows, words=[HOSTILE] * len(made.words))


def head() -> loclin.Head:
    made = hostile(lin().head(1, 1))
    made.triples[0].writes[0] = (HOSTILE, 1.0)
    return made


def score() -> loclin.AttentionScore:
    made = hostile(lin().attention_score("L1H1"))
    return replace(made, by_query=hostile(made.by_query), by_key=hostile(made.by_key))


def interventions() -> loclin.Interventions:
    made = hostile(lin().intervene(["T1", "L1H1"]))
    made.target["tokens"][0] = HOSTILE
    return replace(made, effects=[replace(effect, predicted=HOSTILE) for effect in made.effects])


def prompts() -> loclin.PromptComparison:
    made = hostile(lin().compare_prompts(lin(), 5))
    made.target["tokens"][0] = HOSTILE
    pairs = [replace(pair, first=HOSTILE, second=HOSTILE) for pair in made.pairs]
    return replace(made, pairs=pairs, second=made.provenance)


def patching(by: str) -> loclin.Patching:
    other = loclin.linearize(tiny.llama(), tiny.prompt(4, seed=5), precision="double")
    made = hostile(lin().patch(other, (5, 6), by=by, verify=1))
    made.target["tokens"][0] = HOSTILE
    checked = [replace(effect, predicted=HOSTILE) for effect in made.checked]
    return replace(made, second=made.provenance, checked=checked)


def difference() -> loclin.Attribution:
    made = hostile(lin().attribute(([5, 6], [7, 8, 9]), by="token"))
    made.target["tokens"][0] = made.target["against"]["tokens"][1] = made.target["against"]["inputs"][0] = HOSTILE
    return made


def groups() -> loclin.Attribution:
    made = hostile(lin().attribute(5, by={HOSTILE: [1, 2]}, skip=[0]))
    made.target["tokens"][0] = HOSTILE
    return made


def path() -> loclin.Path:
    made = hostile(lin().path(["L0H0", "L1H1"]))
    made.target["tokens"][0] = HOSTILE
    return made


def comparison() -> loclin.Comparison:
    first, second = (hostile(lin().jacobian().svd(2)), lin().jacobian().svd(2))
    return loclin.compare(first, second)


def reproduction() -> loclin.Reproduction:
    row = Compared("fig3", HOSTILE, HOSTILE, HOSTILE, HOSTILE, "differ", HOSTILE, "sound", HOSTILE)
    grid = Grid(HOSTILE, [HOSTILE], [[[(HOSTILE, -1), (HOSTILE, 0)]]], [HOSTILE], True)
    about = {"files": {"fig3.svg": "0"}, "images": {"fig3.svg": HOSTILE}, "seconds": 1.0, "as_published": True}
    target = Target(HOSTILE, HOSTILE, grids=[grid], compared=[row], passed=False, exact=HOSTILE, warnings=[], **about)
    return loclin.Reproduction(
        HOSTILE, HOSTILE, [target], examples.provenance([HOSTILE]), {"as_published": True}, [HOSTILE]
    )


RATES = Rates(1e11, 1e10, 2e9)
ROW = AnalysisEstimate(HOSTILE, 1, 2, 3, 4, 5, 6, 7.0, False, HOSTILE, Cost())
MADE = {
    "explanation": examples.explanation,
    "attribution": attributions.tokens,
    "attributions": lambda: [attributions.layers(), attributions.heads(), attributions.matrix()],
    "groups": groups,
    "prompts": prompts,
    "interventions": interventions,
    "exploration": exploration,
    "patching": lambda: patching("layer"),
    "heads patched": lambda: patching("head"),
    "difference": difference,
    "layers": lambda: hostile(loclin.explain_layers(lin(), k=2), tokens=[HOSTILE] * 4),
    "generation": generation,
    "validity": lambda: hostile(loclin.validity(lin(), draws=1, swaps=1), tokens=[HOSTILE] * 4),
    "steered": steered,
    "watched": watched,
    "coverage": coverage,
    "study": study,
    "disrupted": disrupted,
    "estimate": lambda: loclin.Estimate(
        HOSTILE, "llama", "float32", 8, *[10**9] * 3, True, 1, 1, RATES, [ROW], [HOSTILE]
    ),
    "svd": lambda: hostile(lin().jacobian().svd(2)),
    "joint svd": lambda: hostile(lin().jacobian().svd(2, joint=True)),
    "spectra": lambda: hostile(lin().layer_spectra(k=2)),
    "head": head,
    "score": score,
    "path": path,
    "comparison": comparison,
    "certificate": lambda: replace(examples.failed(), culprits=(examples.Culprit(HOSTILE, HOSTILE, 0.5),)),
    "norms": lambda: hostile(lin().jacobian().norms()),
    "lens": lambda: hostile(lin().logit_lens(), text=HOSTILE),
    "similarity": lambda: hostile(lin().similarity()),
    "reproduction": reproduction,
    "plan": lambda: hostile(lin().jacobian().plan(2), task=HOSTILE),
}


@cache
def make(name: str) -> Any:
    return MADE[name]()


@pytest.fixture(params=MADE)
def result(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("loclin.report.html.plotly_script", lambda: "/* plotly */")
    return make(request.param)


def test_a_page_is_whole_loads_nothing_and_runs_nothing_of_a_prompt(result: Any) -> None:
    html = display.page(result)
    assert html.startswith("<!doctype html>")
    page = Page(html)
    (policy,) = page.having("http-equiv", "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert len(page.scripts) in (0, 3)
    assert ("script-src" in (policy["content"] or "")) == bool(page.scripts)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert not {"src", "href", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    if page.scripts:
        assert set(page.data.get("figures", ())) <= set(ids)


def test_a_fragment_is_static(result: Any) -> None:
    for one in result if isinstance(result, list) else [result]:
        piece = Page(display.fragment(one) or "")
        assert not piece.scripts
        assert not [tag for tag, _ in piece.elements if tag in ("html", "body", "button", "script")]
        assert not [name for _, attributes in piece.elements for name in attributes if name.startswith("on")]


def test_what_is_hostile_is_shown_as_it_is(result: Any) -> None:
    assert "</script><b" in Page(display.page(result)).text


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_has_no_escapes_and_no_line_too_long(result: Any, width: int) -> None:
    console = Console(file=(out := io.StringIO()), width=width, force_terminal=True, color_system=None)
    display.show(result, console)
    assert out.getvalue().strip()
    assert "\x1b" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_a_terminal_and_a_page_say_the_same_numbers(result: Any) -> None:
    if isinstance(result, loclin.Explanation):
        pytest.skip("its page shows one token's map at a time: see test_page.py")
    console = Console(file=(out := io.StringIO()), width=400)
    display.show(result, console)
    words = [word for word in out.getvalue().split() if word[:1] in "+-0123456789" and "." in word]
    page = Page(display.page(result)).text
    assert [word for word in words if word.rstrip(",;:)") not in page] == []


def test_every_kind_is_tried() -> None:
    own = {type(make(name)) for name in MADE}
    assert set(describe.registry) - {object, Result, Linearized, LinearMap} <= own


def test_a_linearized_prompt_and_its_maps_show_themselves() -> None:
    made = loclin.linearize(tiny.llama(), tiny.prompt(4))
    made.prompt_warnings.append(HOSTILE)
    vars(made)["tokens"] = [HOSTILE] * 4
    for shown in (made._repr_html_(), made.jacobian()._repr_html_()):
        piece = Page(shown)
        assert not piece.scripts
        assert "</script><b" in piece.text
    assert "[24, 4, 24]" in made.jacobian()._repr_html_()


def test_values_that_are_bounds_say_so() -> None:
    svd = lin().jacobian().svd(2)
    assert isinstance(svd, SVD)
    sheet = describe(replace(svd, failure=1.0))
    assert "estimates" in sheet.notes[0]
    assert torch.is_tensor(svd.S)
