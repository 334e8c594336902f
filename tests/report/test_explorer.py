"""The explorer's page in a real browser: its sums are those of Python, and everything works by keys alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loclin
import tiny
from browser import CHROMIUM, Browser
from loclin.report.explorer_page import CLOSES, page
from loclin.results import display

from .examples import HOSTILE

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.processor,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine: install Debian's"),
]
ODD = {8: HOSTILE, 9: "🌉", 10: "‮abc", 11: "\x1b[31m\x00", 12: "שלום"}
"""Tokens of the prompt: markup, an emoji, a character that turns the line, control characters, right-to-left text."""


def exploration() -> loclin.Exploration:
    names = {i: ODD.get(i, f"w{i}") for i in range(2, tiny.VOCABULARY)}
    words = {"<s>": 0, "<unk>": 1} | {name: i for i, name in names.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    model = loclin.wrap(tiny.llama(dtype=torch.float32, biases=True), fast)
    return loclin.linearize(model, [0, *ODD, 20, 20, 20, 33]).explore(count=tiny.VOCABULARY)


@pytest.fixture(scope="module")
def found() -> loclin.Exploration:
    return exploration()


@pytest.fixture(scope="module")
def file(found, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "explore.html"
    path.write_text(display.page(found), "utf-8")
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def opened(tab: Browser, file: Path, fragment: str = "") -> Browser:
    tab.errors.clear()
    tab.screen(1280)
    tab.open(file, fragment)
    tab.wait("document.documentElement.dataset.ready")
    return tab


def compare(tab: Browser, found: loclin.Exploration, pairs: list[tuple[int, int | None]]) -> None:
    """What the page says of words, or differences of two, beside the shares in float64."""
    asked = json.dumps([[a, -1 if b is None else b] for a, b in pairs])
    given = tab.ask(
        f"{asked}.map(([a, b]) => {{ const one = explorer.ask(a, b); return [one.value, one.rounding, one.biases, "
        "[...one.byRow], [...one.byComponent], [...one.heads], [...one.shares]]; })"
    )
    for (a, b), (value, rounding, biases, rows, components, heads, cells) in zip(pairs, given, strict=True):
        asked_for: Any = found.ids[a] if b is None else (found.ids[a], found.ids[b])
        goal, shares, own = found.goal(asked_for), found.shares(asked_for), found.head_shares(asked_for)
        close = CLOSES * max(abs(goal.value), 1.0) * (1 if b is None else 2)
        assert abs(value - goal.value) < 1e-6
        assert abs(rounding) <= close
        assert biases == pytest.approx(shares[-1].sum().item() + goal.offset, abs=close)
        for numbers, expected in (
            (rows, shares.sum(1)),
            (components, shares.sum(0)),
            (heads, own),
            (cells, shares.flatten()),
        ):
            assert (torch.tensor(numbers, dtype=torch.float64) - expected).abs().max() <= close
        assert abs(sum(rows) + goal.offset + rounding - value) < 1e-9


def test_sums_are_those_of_python_for_every_word(tab, file, found):
    opened(tab, file)
    n = len(found.ids)
    compare(tab, found, [(i, None) for i in range(n)] + [(i, (7 * i + 3) % n) for i in range(n)])
    assert tab.errors == []


@pytest.mark.real
def test_a_real_page_is_small_quick_and_right_for_200_words(tab, tmp_path):
    lin = loclin.linearize(loclin.load("smollm2-135m"), "The bridge out of Marin is the", bos=True)
    found = lin.explore([" Marin"])
    (path := tmp_path / "page.html").write_text(page(found), "utf-8")
    assert len(lin.tokens) == 8
    assert path.stat().st_size < 3e6
    opened(tab, path)
    chosen = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(0))[:200].tolist()
    compare(tab, found, [(i, None) for i in chosen])
    by_token = lin.attribute((" only", " most"))
    only, most = found.index(" only"), found.index(" most")
    rows = tab.ask(f"[...explorer.ask({only}, {most}).byRow]")
    assert rows[:-1] == pytest.approx(by_token.by_token()[0], abs=2 * CLOSES * abs(found.goal(" only").value))
    took = min(tab.ask(f"[{most}, {only}, 0].map((i) => (explorer.choose(i), explorer.took))"))
    opening = tab.ask("explorer.opened")
    print(f"{path.stat().st_size / 1e6:.2f} MB, opened in {opening:.0f} ms, another word in {took:.0f} ms")
    assert tab.errors == []


def test_a_word_is_typed_and_its_shares_come(tab, file, found):
    opened(tab, file)
    tab.ask("document.getElementById('word').focus()")
    tab.press("w21", "Enter")
    state = tab.ask("[explorer.state.word, explorer.state.minus, document.getElementById('sum').textContent]")
    assert state[0] == found.index(" w21")
    assert state[1] == len(found.ids)
    goal = found.goal(found.ids[state[0]]).value - found.logits[-1].item()
    assert f"{abs(goal):.5g}"[:5] in state[2]
    tab.ask("document.getElementById('word').focus()")
    tab.press("w30 − w31", "Enter")
    assert tab.ask("[explorer.state.word, explorer.state.minus]") == [found.index(" w30"), found.index(" w31")]
    tab.ask("(document.getElementById('word').blur(), document.getElementById('word').focus())")
    tab.press("w4", "ArrowDown", "ArrowDown", "Enter")
    assert tab.ask("explorer.state.word") != found.index(" w30")
    tab.ask("(document.getElementById('word').blur(), document.getElementById('word').focus())")
    tab.press('zebra "x', "Enter")
    missing = tab.ask("document.getElementById('missing').textContent")
    assert r'--word "zebra \"x"' in missing
    assert tab.errors == []


def test_everything_works_by_keys(tab, file, found):
    opened(tab, file)
    last = len(found.rows)
    tab.ask("document.querySelector('#chips [tabindex=\"0\"]').focus()")
    tab.press("Home", "ArrowRight")
    tab.press("ArrowRight", "ArrowRight", shift=True)
    assert tab.ask("document.querySelectorAll('#chips .marked').length") == 3
    before = tab.ask("explorer.now.value")
    tab.press("Delete")
    gone = tab.ask("[...explorer.state.out.rows, explorer.now.gone]")
    assert gone[:-1] == [1, 2, 3]
    goal, shares = found.goal(), found.shares()
    assert before == pytest.approx(goal.value, abs=1e-6)
    assert gone[-1] == pytest.approx(shares[1:4].sum().item(), abs=2e-3 * max(1, abs(goal.value)))
    tab.ask("document.getElementById('grid').focus()")
    tab.press("ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowDown", "ArrowRight", "Delete")
    out = tab.ask("[...explorer.state.out.components]")
    assert out
    rest = shares[[i for i in range(last + 1) if i not in (1, 2, 3)]][:, out].sum().item()
    assert tab.ask("explorer.now.gone") - gone[-1] == pytest.approx(rest, abs=4e-3 * max(1, abs(goal.value)))
    tab.ask("document.getElementById('heads').focus()")
    tab.press("Delete")
    assert "cannot be out together" in tab.ask("document.getElementById('missing').textContent")
    tab.ask(
        "(explorer.state.out.rows.clear(), explorer.state.out.components.clear(), explorer.choose(explorer.state.word))"
    )
    tab.press("ArrowUp", "ArrowRight", "Delete")
    (head,) = tab.ask("[...explorer.state.out.heads]")
    assert tab.ask("explorer.now.gone") == pytest.approx(
        found.head_shares()[head].item(), abs=2e-3 * max(1, abs(goal.value))
    )
    assert tab.errors == []


@pytest.mark.parametrize("unit", ["word", "sentence", "line"])
def test_groups_add_up(tab, file, found, unit):
    opened(tab, file, f"#by={unit}&fold=1")
    lines = [line.rsplit(",", 3) for line in tab.ask("explorer.csv('tokens')").splitlines() if line[0] != "#"]
    *shares, (_, _, _, total) = lines[1:]
    assert sum(float(share) for *_, share in shares) == pytest.approx(float(total), abs=1e-9)
    apart = {*found.sinks, *found.special}
    owner = {i: number for number, group in enumerate(found.groups[unit]) for i in group.positions}
    expected, by_token = dict[int, float](), found.shares().sum(1).tolist()
    for i in range(len(found.rows)):
        expected[-1 if i in apart else owner[i]] = expected.get(-1 if i in apart else owner[i], 0) + by_token[i]
    assert [float(share) for *_, share in shares[:-2]] == pytest.approx(list(expected.values()), abs=2e-3)
    assert shares[0][0].startswith(f'"{len(apart)} folded')


def test_the_address_holds_all_that_is_chosen(tab, file, found):
    ids = found.ids
    fragment = f"#w={ids[4]}&m={ids[9]}&pin={ids[4]}.{ids[5]}&span=2-4&show=rank&no-rows=1.2&cell=3.2&head=2"
    opened(tab, file, fragment)
    state = "JSON.stringify(explorer.state, (key, value) => value instanceof Set ? [...value] : value)"
    first, kept = tab.ask(state), tab.ask("location.hash")
    assert json.loads(first) | {"fold": False} == {
        "word": 4, "minus": 9, "pins": [4, 5], "unit": "", "spans": [[2, 4]], "fold": False, "show": "rank",
        "cell": [3, 2], "head": 2, "out": {"rows": [1, 2], "components": [], "heads": []},
    }  # fmt: skip
    opened(tab, file, kept)
    assert tab.ask(state) == first
    for broken in ("#w=999&m=-5&cell=99.99&head=1e9&no-rows=77&span=5-1.x&by=__proto__&show=<b>", "#%E0%A4%A", "#=&&="):
        opened(tab, file, broken)
        assert tab.ask("explorer.state.word") >= 0
        assert tab.errors == []


def test_files_name_what_they_are_of(tab, file, found):
    opened(tab, file)
    for panel in ("tokens", "grid", "heads", "ranks", "frozen"):
        text = tab.ask(f"explorer.csv('{panel}')")
        for piece in ("tiny", "gate activation", "exact", "# shared out: ", "loclin 0"):
            assert piece in text or piece == "tiny"
        assert not re.search(r'(^|,)"[=+@-]', text, flags=re.M)
        assert tab.ask(f"explorer.png('{panel}').then((blob) => blob.size)") > 3000
    heads = [line.split(",") for line in tab.ask("explorer.csv('heads')").splitlines() if line[0] != "#"][1:]
    assert [float(share) for _, share in heads] == pytest.approx(found.head_shares().tolist(), abs=2e-3)
    assert tab.errors == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(tab, file, width, dark):
    tab.errors.clear()
    tab.screen(width, dark=dark)
    tab.open(file, "#show=lens")
    tab.wait("document.documentElement.dataset.ready")
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert tab.ask("document.querySelectorAll('script[src], link, img, b[onmouseover]').length") == 0
    shown = tab.ask("document.getElementById('chips').textContent")
    for piece in ("</script><b·onmouseover=", "🌉", "\\u202eabc", "\\x1b[31m\\x00", "שלום"):
        assert piece in shown
    low = tab.ask(CONTRAST)
    assert low == []
    unnamed = tab.ask(UNNAMED)
    assert unnamed == []
    assert tab.errors == []


def test_a_browser_that_cannot_unpack_says_so(tab, file):
    tab.errors.clear()
    tab.open(file, before="delete window.DecompressionStream")
    tab.wait("!document.getElementById('failed').hidden")
    assert "no DecompressionStream" in tab.ask("document.getElementById('failed').textContent")
    assert tab.ask("document.getElementById('table').open")
    assert tab.ask("document.getElementById('explorer').hidden")
    assert tab.errors == []


@pytest.mark.parametrize("change", ["cut", "numbers"])
def test_an_altered_file_says_so_and_runs_nothing(tab, file, tmp_path, change):
    text = file.read_text("utf-8")
    start = text.index('id="blob">') + len('id="blob">')
    altered = (
        text[: start + 400] + text[start + 900 :]
        if change == "cut"
        else text.replace('"offsets":[', '"offsets":["x",', 1)
    )
    (path := tmp_path / "altered.html").write_text(altered, "utf-8")
    tab.errors.clear()
    tab.open(path)
    tab.wait("!document.getElementById('failed').hidden")
    assert "altered or cut short" in tab.ask("document.getElementById('failed').textContent")
    assert tab.errors == []


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(one);
    if (!own || !one.checkVisibility() || one.disabled || one.closest("script, style, option, i, .dim")) continue;
    const layers = [];
    for (let at = one; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    const back = layers.reduce((under, layer) => over(layer, under), [255, 255, 255]);
    const [a, b] = [light(over(parse(style.color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([one.tagName, one.className, one.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return found;
})()"""
UNNAMED = """[...document.querySelectorAll("button, input, select, [tabindex]")]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length))
  .map((one) => one.outerHTML.slice(0, 80))"""
