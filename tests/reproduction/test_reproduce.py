"""`reproduce` on a tiny model: what it writes, how it goes on, and which folders it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import loclin
import tiny
from loclin.analyses.estimate import AnalysisEstimate
from loclin.common.rehearsal import Cost, Rates
from loclin.errors import BudgetError, ModelError, OptionError, OutputError
from loclin.reproduction import golden, page, run, sources, targets
from loclin.reproduction.folder import Folder
from loclin.reproduction.golden import PaperModel, Published, read_golden
from loclin.reproduction.targets import TARGETS, find_targets

pytest.importorskip("matplotlib")
TEXT = "The bridge out of Marin is the Golden Gate I ' m going to arizona see Here a painting went new york"
STARTS = {".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG", ".md": b"The", ".tex": b"% needs", ".html": b"<!"}
FORMS = (".svg",)
"""One form of each figure: drawing takes most of the time."""
PROMPT = "The bridge is"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny model that has the words of the paper's prompts."""
    path = tmp_path_factory.mktemp("tiny-paper")
    tiny.llama(dtype=torch.float32).to("cpu").save_pretrained(path)
    words = ["<s>", "<unk>", *TEXT.split()]
    words += [f"w{i}" for i in range(tiny.VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(directory) -> loclin.Model:
    return loclin.load(str(directory))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Every target, with the published mistakes: the folder and what was returned."""
    out = tmp_path_factory.mktemp("whole") / "repro"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "FORMS", FORMS)
        return out, loclin.reproduce(model, out, as_published=True, progress=False)


@pytest.fixture(autouse=True)
def _draw_once(monkeypatch):
    monkeypatch.setattr(targets, "FORMS", FORMS)


def told(model, out, *names, **options) -> list[str]:
    """The lines that a run tells of targets."""
    lines: list[str] = []
    loclin.reproduce(model, out, list(names) or None, progress=lines.append, **options)
    return [line for line in lines if line.startswith("[")]


def test_each_target_is_written(whole):
    out, found = whole
    assert [target.name for target in found.targets] == list(TARGETS)
    written = [file for target in found.targets for file in target.files]
    assert len(written) == len(set(written))
    for file in written:
        assert (out / file).read_bytes().startswith(STARTS[Path(file).suffix]), file
    assert {"fig4a.svg", "fig6.svg", "figA1.svg", "table1.tex", "table5-as-published.md"} <= set(written)
    assert all(target.passed and target.seconds >= 0 for target in found.targets)
    assert not list(out.rglob("*.partial"))


def test_a_figure_has_three_forms(model, tmp_path, monkeypatch):
    monkeypatch.undo()
    (target,) = loclin.reproduce(model, tmp_path / "out", ["fig3"], prompt=PROMPT, progress=False).targets
    assert list(target.files) == ["fig3.svg", "fig3.pdf", "fig3.png"]
    assert all((tmp_path / "out" / file).read_bytes().startswith(STARTS[Path(file).suffix]) for file in target.files)


def test_the_page_has_every_part_and_needs_no_other_file(whole):
    out, found = whole
    text = (out / "index.html").read_text()
    assert "the paper has no figures of this model" in text
    for target in found.targets:
        assert re.search(rf"<h2>[^<]*\b{target.name}\b", text), target.name
    images = [file for target in found.targets for file in target.images]
    assert text.count("data:image/svg+xml;base64,") == len(images) == 7
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    assert "img-src data:" in text
    assert (
        text.count("<b>As published.</b>") == 2 + 1
    )  # two lists, the tables 5 to 7 in one part; of three layers none steers elsewhere
    assert "Grand Canyon, and I&#39;m planning to hike" in text  # the paper's own text beside ours
    assert "<h2>table1, table2, table3</h2>" in text


def test_the_result_is_saved_and_shown(whole, capsys):
    out, found = whole
    loaded = loclin.Reproduction.load(out / "results.json")
    assert loaded == replace(found, folder=None)
    assert (loaded.paper_model, loaded.compared, loaded.passed) == (None, [], True)
    loaded.show()
    assert "not comparable: the paper has no figures of this model" in capsys.readouterr().out
    assert "data:image" not in loaded.to_html()  # its folder is not known


def test_a_second_run_makes_only_what_is_missing(whole, model, monkeypatch):
    out, _ = whole
    for name in ("explain", "explain_layers", "steer", "repeat_mistakes"):
        monkeypatch.setattr(sources, name, lambda *_, **__: pytest.fail("an analysis was made again"))
    lines = told(model, out, as_published=True)
    assert len(lines) == len(TARGETS)
    assert all(line.endswith("done before") for line in lines)
    (out / "fig3.svg").unlink()
    (out / "table1.md").write_text("altered")
    lines = told(model, out, as_published=True)
    made = [line.split()[1].strip(":") for line in lines if " made in " in line]
    assert made == ["fig3", "table1"]
    assert (out / "table1.md").read_text().startswith("The")


def test_mistakes_that_were_not_asked_for_are_not_kept(model, tmp_path):
    loclin.reproduce(model, tmp_path / "out", ["table5"], as_published=True, progress=False)
    (target,) = loclin.reproduce(model, tmp_path / "out", ["table5"], progress=False).targets
    assert [grid.as_published for grid in target.grids] == [False]


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    out, about = tmp_path / "out", TARGETS["table1"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(TARGETS, "table1", replace(about, make=interrupt))
    with pytest.raises(KeyboardInterrupt):
        loclin.reproduce(model, out, ["fig3", "table1"], progress=False)
    assert not (out / "results.json").exists()
    monkeypatch.setitem(TARGETS, "table1", about)
    lines = told(model, out, "fig3", "table1")
    assert lines[0] == "[1/2] fig3: done before"
    assert lines[-1].startswith("[2/2] table1: made in")
    assert (out / "index.html").is_file()


def test_a_folder_of_another_run_is_refused_and_only_its_own_files_are_removed(model, tmp_path):
    out = tmp_path / "out"
    loclin.reproduce(model, out, ["table5"], progress=False)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r'gate: "activation" there, "half" here.*--fresh'):
        loclin.reproduce(model, out, ["table1"], gate="half", progress=False)
    assert (out / "table5.md").exists()
    found = loclin.reproduce(model, out, ["table1"], gate="half", fresh=True, progress=False)
    assert found.provenance.gate == "half"
    assert not (out / "table5.md").exists()
    assert (out / "mine.txt").read_text() == "keep"


def test_other_weights_of_the_same_name_are_refused(model, tmp_path):
    loclin.reproduce(model, tmp_path, ["table1"], progress=False)
    other = loclin.wrap(tiny.llama(seed=5, dtype=torch.float32), model.tokenizer, name=model.info.name)
    with pytest.raises(OutputError, match="holds another run"):
        loclin.reproduce(replace(other, info=model.info), tmp_path, ["table1"], progress=False)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_refused(model, tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"holds something else \(thesis.tex\)"):
        loclin.reproduce(model, tmp_path, ["fig3"], fresh=fresh, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder_are_refused(model, tmp_path):
    with Folder.opened(tmp_path, {}, fresh=False), pytest.raises(OutputError, match="in use by another run"):
        loclin.reproduce(model, tmp_path, ["fig3"], progress=False)


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        loclin.reproduce(model, tmp_path / "file" / "out", ["fig3"], progress=False)


def test_targets_are_found_by_their_names():
    assert find_targets(["Table 4", "figure 3", "a1", "fig3"]) == ["fig3", "figA1", "steering"]
    assert find_targets(None) == list(TARGETS)
    with pytest.raises(OptionError, match=r"'tabel1' \(did you mean table1.*\): the targets are fig2, .*steering"):
        find_targets(["tabel1"])
    with pytest.raises(OptionError, match="name a target"):
        find_targets([])


def test_figures_of_the_paper_are_compared(model, tmp_path, monkeypatch):
    """A model that is taken for one of the paper's: one figure agrees, one differs, one is of another dtype."""
    lin = loclin.linearize(model, PROMPT)
    explained, layers = lin.explain(k=8), lin.explain_layers(signs="final")
    word = explained.predictions[0][0]
    sizes = [token.singular_values[0] for token in explained.tokens]
    known = read_golden()
    figures = [
        Published("fig3", "tiny", "prediction", word, "float32", PROMPT, "sound", "a test"),
        Published("fig3", "tiny", "error", 1e-6, "float64", PROMPT, "sound", "a test"),
        Published("fig5", "tiny", "s0", [1.5 * size for size in sizes], "float32", PROMPT, "sound", "a test"),
        Published("fig6", "tiny", "rank", layers.main.joint_stable_rank[1], "bfloat16", PROMPT, "plot", "a test", 2),
    ]
    shape = PaperModel("tiny", ["org/tiny"], "llama", 24, 3, 40, 61, gated=False)
    made = replace(known, prompt=PROMPT, models=[*known.models, shape], figures=[*known.figures, *figures])
    for module in (golden, page, run, sources):
        monkeypatch.setattr(module, "read_golden", lambda: made)
    out = tmp_path / "out"
    found = loclin.reproduce(model, out, ["fig3", "fig5"], progress=False)
    assert [(row.what, row.verdict) for row in found.compared] == [
        ("next token (float32)", "agree"),
        ("std(error) / std(y) (float64)", "not comparable"),
        ("largest singular value of each token (float32)", "differ"),
    ]
    assert (found.paper_model, found.recognised, found.passed) == ("tiny", "its shape", False)
    assert any("by its shape alone" in warning for warning in found.warnings)
    text = (out / "index.html").read_text()
    assert text.count(">differ<") == 1
    other = loclin.reproduce(model, tmp_path / "other", ["table1"], prompt="Here is a", progress=False)
    assert other.compared == []
    assert any("Nothing is compared" in warning for warning in other.warnings)


def test_a_model_of_the_paper_that_is_not_there(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"meta-llama/Llama-3.2-3B-Instruct'? \(gated.*HF_TOKEN.*--model DIRECTORY"):
        loclin.reproduce("meta-llama/Llama-3.2-3B-Instruct", tmp_path / "out", ["fig3"], progress=False)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]  # another model may take the folder


def test_too_little_memory_is_said_before_the_model_is_loaded(directory, tmp_path, monkeypatch):
    asked = []

    def estimate(_name, *, stream, **_options):
        asked.append(stream)
        row = AnalysisEstimate("explain", 0, 0, 0, 9 * 10**9, 0, 0, 60.0, False, "dtype=bfloat16", Cost())
        rates = Rates(1e11, 1e10, 2e9)
        return loclin.Estimate("m", "llama", "float32", 8, 1, 1, 1, stream, 10**9, 10**8, rates, [row], [])

    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(run, "estimate", estimate)
    with pytest.raises(BudgetError, match=r"needs about 9.4 GB and .* free; what would fit: dtype=bfloat16"):
        loclin.reproduce(str(directory), tmp_path / "out", ["fig3"], progress=False)
    assert asked == [False, True]  # perhaps it fits with its layers on disk


def test_the_run_says_what_it_is_of(whole):
    out, found = whole
    known = json.loads((out / "run.json").read_text())
    assert known["asked"]["versions"] == found.provenance.versions
    assert known["weights"]["info"] == found.provenance.model.to_dict()


def test_characters_without_a_font_are_named_once():
    each = [f"No installed font has {named}: written as escapes." for named in ("a (U+0061) b (U+0062)", "b (U+0062)")]
    joined = run._join_warnings([each[0], "another", each[1], "another"])
    assert joined == ["another", "No installed font has a (U+0061) b (U+0062): written as escapes."]
