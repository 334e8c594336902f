"""Verdicts on the paper's claims: the rules on made-up numbers, lines that go on, and the page that is committed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loclin
from loclin.analyses.faithfulness.prompts import StudyPrompt
from loclin.errors import OptionError, OutputError, ResultError

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import claims  # noqa: E402 (found by the line above)
import claims_measure  # noqa: E402
import claims_page  # noqa: E402
import claims_rules as rules  # noqa: E402
import claims_steering  # noqa: E402

PROMPTS = [StudyPrompt("words", text, "held-out") for text in ("w1 w2 w3 w4", "w5 w6 w7", "w8 w2 w9 w4 w1")]


@pytest.fixture(scope="module")
def model(directory):
    return loclin.load(directory)


@pytest.fixture(scope="module")
def lines(model):
    """The lines of a small run, without settings."""
    found = []
    for variant in claims_measure.VARIANTS:
        network = claims_measure.vary(model, variant, 0) if variant in claims_measure.NULLS else model
        for prompt in PROMPTS if variant in ("model", "layers") else PROMPTS[:1]:
            measured = claims_measure.measure(network, variant, prompt.text)
            found.append({"variant": variant, "kind": prompt.kind, "text": prompt.text, **measured})
    return found


def measured(low: float, high: float, main: bool = False, **threshold: float) -> rules.Measured:
    return rules.Measured("x", rules.Estimate((low + high) / 2, low, high, 9), main=main, **threshold)


MET, OPEN, MISSED = (
    measured(2, 3, at_least=1.0), measured(0, 2, at_least=1.0), measured(0, 0.5, at_least=1.0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([MET, measured(5, 6)], "holds"),
        ([MET, measured(1, 2, at_most=2.0, main=True)], "holds"),
        ([MET, OPEN], "partly"),
        ([MET, MISSED], "partly"),
        ([MET, replace(OPEN, main=True)], "partly"),
        ([MET, replace(MISSED, main=True)], "does not hold"),
        ([measured(3, 4, at_most=2.0, main=True), MET], "does not hold"),
        ([replace(MISSED, main=True, estimate=replace(MISSED.estimate, n=4))], "partly"),  # too few prompts
    ],
)
def test_a_verdict(found, verdict):
    assert rules.judge(found) == verdict


def test_verdicts_over_models():
    assert rules.join(["holds", "holds"]) == "holds"
    assert rules.join(["does not hold"]) == "does not hold"
    assert rules.join(["holds", "does not hold"]) == rules.join(["partly", "holds"]) == "partly"


def test_estimates():
    half = rules.share([True, False] * 50)
    assert (half.value, half.n, half.how) == (0.5, 100, "Wilson")
    assert half.low == pytest.approx(0.4038, abs=1e-4)
    assert half.high == pytest.approx(0.5962, abs=1e-4)
    apart = rules.ratio([1.0, 2.0, 4.0], [16.0, 32.0, 64.0])
    assert apart.value == pytest.approx(1 / 16)
    assert apart.low < 1 / 16 < apart.high < 1
    assert rules.geometric([1.0, 100.0]).value == pytest.approx(10)


def test_a_transition():
    assert rules.transition([9000, 8000, 5, 1]) == (2, 2)  # one step
    assert rules.transition([9000, 900, 400, 90, 8, 20, 3]) == (1, 6)
    assert rules.width([9000, 900, 400, 90, 8, 20, 3]) == 6
    assert rules.transition([9000, 5, 40]) is None  # gone again
    assert rules.transition([900, 5, 4]) is None  # readable from the beginning
    assert rules.steady_width([10_000, 1, 1, 1, 1, 1]) == 3  # two of four decades
    abrupt = [5000] * 10 + [1] * 10
    assert rules.width(abrupt) == 1 < rules.shuffled_width(abrupt)


def test_words_are_compared_without_case_and_space():
    vectors = [{"word_rank": 3, "words": [[" bridge"], ["x"]]}, {"word_rank": None, "words": [["Bridge"], ["y"]]}]
    vectors += [{"word_rank": 80, "words": [["road"], ["z", "BRIDGE"]]}, {"word_rank": 9, "words": [["a"], ["b"]]}]
    assert [rules.writes(vector, " Bridge") for vector in vectors] == [True, False, True, False]
    assert rules.hits(vectors, "bridge") == 0.5


def test_predictions_of_other_prompts_are_the_null():
    """A vector that writes the same words everywhere says nothing about its prompt."""
    words = {"word_rank": 1, "words": [["one", "two", "three", "four"], []]}
    lines = [{"target": word, "v": words} for word in ("one", "two", "three", "four")]
    assert rules.beyond(lines, lambda line: [line["v"]]).value == 0
    own = [{"target": word, "v": {"word_rank": 1, "words": [[word], []]}} for word in ("one", "two", "three")]
    assert rules.beyond(own, lambda line: [line["v"]]).value == 1


def test_peaks_and_falls():
    assert rules.peak({"own_rank": [1.0, 3.0, 7.0, 9.0, 2.0]}) == 0.75
    assert rules.fall({"layer_rank": [9.0, 7.0, 4.0, 2.0]}) == pytest.approx(-1)
    assert rules.change({"layer_rank": [8.0, 9.0, 2.0]}) == 0.25


def test_maps_of_layers(model, lines):
    """The last token's maps are the layers' own ones multiplied; those of all tokens are those of `loclin layers`."""
    prompt = PROMPTS[0].text
    lin = loclin.linearize(model, prompt, bos=True)
    found = {line["variant"]: line for line in lines if line["text"] == prompt}
    explained = loclin.explain_layers(lin, k=2, components=["resid_post"], progress=False).main
    one, all_ = found["layers"], found["all tokens"]
    assert one["layer_rank"] == pytest.approx([ranks[-1] for ranks in explained.token_stable_rank], rel=2e-3)
    assert one["own_rank"] == pytest.approx(explained.joint_own_rank, rel=2e-3)
    assert all_["layer_rank"] == pytest.approx(explained.joint_stable_rank, rel=2e-3)
    assert all_["stable_rank"] == pytest.approx(lin.jacobian().stable_rank().tolist(), rel=2e-3)
    assert found["model"]["std_error"] < 1e-4 < found["model"]["ordinary_error"]


def test_words_of_first_vectors(model, lines):
    lin = loclin.linearize(model, PROMPTS[0].text, bos=True)
    dense, target = lin.jacobian().dense(), lin.next_token_ids(1)[0][0]
    names = ("model", "layers", "all tokens")
    whole, one, all_ = (next(line for line in lines if line["variant"] == variant) for variant in names)
    for matrix, found in (
        (dense[:, 2], all_["each"][2]),
        (dense[:, -1], one["last"]),
        (dense.flatten(1), whole["whole"]),
    ):
        logits = model.head.weight @ torch.linalg.svd(matrix, full_matrices=False)[0][:, 0]
        assert found["word_rank"] == min(int((side > side[target]).sum()) + 1 for side in (logits, -logits))
        ends = model.decode_each([int(logits.argmax()), int(logits.argmin())])
        assert {words[0] for words in found["words"]} == set(ends)


@pytest.mark.parametrize("variant", ["random", "fresh"])
def test_null_models_have_other_weights_of_the_same_shape(model, variant):
    before = [weight.clone() for weight in model.hf.parameters()]
    network = claims_measure.vary(model, variant, 0)
    for own, trained, kept in zip(network.hf.parameters(), model.hf.parameters(), before, strict=True):
        assert own.shape == trained.shape
        assert torch.equal(trained, kept)
        if variant == "random":
            assert not torch.equal(own, trained)
            assert own.std().item() == pytest.approx(trained.std().item(), rel=0.3)


def test_a_run_goes_on(model, tmp_path, monkeypatch):
    path, calls = tmp_path / "claims-tiny.jsonl", []

    def note(_network, variant, text):
        calls.append((variant, text))
        return {"number": len(calls)}

    monkeypatch.setattr(claims, "measure", note)
    claims.run(model, path, PROMPTS[:2], 1, 1, fresh=False)
    assert [variant for variant, _ in calls] == ["model", "model", "random", "fresh", "all tokens", "layers"]
    whole = path.read_text()
    path.write_text(whole[:-10])  # an interrupted run left half a line
    claims.run(model, path, PROMPTS, 1, 1, fresh=False)
    assert calls[6:] == [("model", PROMPTS[2].text), ("layers", PROMPTS[0].text)]
    assert [line["number"] for line in claims.read(path)[1:]] == [1, 2, 3, 4, 5, 7, 8]

    other = path.read_text().replace('"seed": 0', '"seed": 1')
    path.write_text(other)
    with pytest.raises(OutputError, match=r"another seed: .*--fresh"):
        claims.run(model, path, PROMPTS, 1, 1, fresh=False)
    assert path.read_text() == other
    claims.run(model, path, PROMPTS[:1], 1, 1, fresh=True)
    assert len(claims.read(path)) == 6


def test_mistakes(tmp_path, capsys, monkeypatch):
    with pytest.raises(OptionError, match="--prompts 0"):
        claims.choose(0)
    monkeypatch.setattr(sys, "argv", ["claims.py", "--few", "0"])
    assert claims.main() == 2
    assert "--few 0" in capsys.readouterr().err
    path = tmp_path / "claims-gemma-3-270m.jsonl"
    path.write_text("something else\n")
    monkeypatch.setattr(sys, "argv", ["claims.py", "--page", "--out", str(tmp_path), "-o", str(tmp_path / "page.md")])
    assert claims.main() == 2
    assert f"{path} does not have the lines" in capsys.readouterr().err
    path.unlink()
    assert claims.main() == 2
    assert "no lines" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_prompts_are_short_and_of_all_kinds():
    chosen = claims.choose(claims.PROMPTS)
    counts = {prompt.kind: sum(other.kind == prompt.kind for other in chosen) for prompt in chosen}
    assert len(counts) == 8
    assert set(counts.values()) == {claims.PROMPTS // 8}
    assert len({prompt.text for prompt in chosen}) == claims.PROMPTS >= 100
    assert claims.choose(16) == chosen[:16]


def test_an_unfinished_run_has_no_page(lines):
    with pytest.raises(ResultError, match="no lines yet of: random, fresh;"):
        rules.Lines.of([line for line in lines if line["variant"] not in claims_measure.NULLS])


def test_a_page_from_lines(lines, monkeypatch):
    monkeypatch.setattr(claims_page, "steer", lambda _name: [MET, replace(MISSED, what="y", main=True)])
    found = {"tiny": [{"model": {"stored_dtype": "float32"}}, *lines]}
    text = claims_page.page(found)
    assert text == claims_page.page(json.loads(json.dumps(found)))
    for number, claim in enumerate([*rules.CLAIMS, claims_steering.STEERING], 1):
        assert f"## {number}. {claim.title}: " in text
    for claim in rules.CLAIMS:
        names = [one.what for one in claim.measure(rules.Lines.of(lines))]
        assert len(set(names)) == len(names)  # the page has one row for each
    assert "## 2. The ordinary Jacobian does not reconstruct: partly" in text  # three prompts are too few
    assert "## 8. The operator steers: does not hold" in text
    assert "Not met on tiny: y (missed)." in text


def test_steering_is_read_from_its_results():
    held = json.loads((ROOT / "bench" / "results" / "steering-smollm2-135m.json").read_text())
    found = claims_steering.Gain.of(held, claims_steering.PUBLISHED)
    rows = json.loads((ROOT / "bench" / "results" / "steering.json").read_text())["rows"]
    (row,) = (row for row in rows if row["name"] == "smollm2-135m: operator (published), gain at KL 1")
    assert found.value == pytest.approx(row["value"])
    assert found.n == 400
    assert (found - found).estimate.high == 0


def test_the_committed_page_is_that_of_the_committed_lines():
    found = {name: claims.read(claims.file_of(name, claims.RESULTS)) for name in claims.MODELS}
    assert claims.PAGE.read_text("utf-8") == claims_page.page(found)
