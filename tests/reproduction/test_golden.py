"""The packaged figures of the paper, which models they are of, and what counts as agreeing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import loclin
import tiny
from loclin.figures.names import find
from loclin.reproduction.compare import compare, compare_steering
from loclin.reproduction.golden import Published, find_alike, read_golden, recognise
from loclin.reproduction.published import PART, merge_wrongly, repeat_mistakes
from loclin.reproduction.targets import TARGETS
from loclin.steering.steer import Steered
from loclin.steering.writing import Continuation
from report.examples import certificate, explanation, provenance, token

GOLDEN = read_golden()


def test_every_figure_is_of_a_known_model_and_target():
    names = {model.name for model in GOLDEN.models}
    for one in GOLDEN.figures:
        assert one.model in names
        assert one.target in TARGETS
        assert one.trust in GOLDEN.trust
        assert one.source
        layers = next(model.layers for model in GOLDEN.models if model.name == one.model)
        if one.kind in ("rank", "own_rank", "path", "table_word"):
            assert isinstance(one.at, int)
            assert 1 <= one.at <= layers
    assert {setting.model for setting in GOLDEN.steering} <= names
    assert all(find(target) for target in TARGETS if target.startswith("table"))


def test_models_are_known_by_their_names_or_by_a_shape_that_no_other_has():
    tiny_model = loclin.wrap(tiny.llama(dtype=torch.float32))
    config = tiny_model.hf.config

    def named(name, source="hub"):
        return recognise(replace(tiny_model, info=replace(tiny_model.info, name=name, source=source)))[0]

    assert named("meta-llama/Llama-3.2-3B-Instruct").name == "Llama-3.2-3B-Instruct"
    assert named("unsloth/Qwen3-32B-bnb-4bit").name == "Qwen3-32B"
    assert named("/models/gemma-3-4b-it", "directory").name == "gemma-3-4b-it"
    assert named("meta-llama/Llama-3.2-3B") is None  # a base model is not the instructed one
    assert named("somewhere", "directory") is None
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 3072, 28, 8192
    assert named("somewhere", "directory").name == "Llama-3.2-3B-Instruct"
    assert named("org/a-fine-tune") is None
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 4096, 36, 12288
    info = replace(tiny_model.info, name="somewhere", source="directory", family="qwen3")
    alike = replace(tiny_model, info=info)
    assert recognise(alike) == (None, "")
    assert [one.name for one in find_alike(alike)] == ["Qwen3-8B", "DeepSeek-R1-0528-Qwen3-8B"]


def published(kind, value, dtype="float32", at=None) -> Published:
    return Published("fig3", "m", kind, value, dtype, "p", "sound", "s", at)


@pytest.mark.parametrize(
    ("figure", "precision", "verdict"),
    [
        (published("prediction", "only"), "bfloat16", "agree"),
        (published("prediction", "most"), "float32", "differ"),
        (published("prediction", "only", "4-bit"), "float32", "not comparable"),
        (published("prediction", "only"), "gptq", "not comparable"),
        (published("error", 1e-7), "float32", "agree"),  # ours is 5e-7: five times as large
        (published("error", 0.9e-7), "float32", "differ"),
        (published("error", 1e-7), "bfloat16", "not comparable"),
        (published("s0", [2.0, 2.0, 2.02]), "float32", "agree"),
        (published("s0", [2.0, 2.0, 2.05]), "float32", "differ"),
        (published("s0", [2.0, 2.0, 2.05], "bfloat16"), "float32", "agree"),
        (published("s0", [2.0, 2.0]), "float32", "not comparable"),
        (published("u0", ["left", "other"], at=1), "float32", "agree"),
        (published("u0", ["left", "other", "more"], at=1), "float32", "differ"),
        (published("u0", ["left"], at=7), "float32", "not comparable"),
    ],
)
def test_what_agrees(figure, precision, verdict):
    found = explanation([token("a", 1.0), token("b", 1.0), token("c", 1.0)], certificate=certificate())
    made = compare(figure, found, precision)
    assert made.verdict == verdict, made
    assert made.tolerance
    assert bool(made.ours) == (verdict != "not comparable")


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        ("rank", "agree"),
        ("own_rank", "agree"),
        ("path", "agree"),
        ("rank beyond", "differ"),
        ("path beyond", "differ"),
        ("layer that is not there", "not comparable"),
    ],
)
def test_what_agrees_layer_by_layer(layers, figure, verdict):
    main = layers.main
    made = {
        "rank": published("rank", 1.2 * main.joint_stable_rank[1], "bfloat16", 2),
        "rank beyond": published("rank", 1.5 * main.joint_stable_rank[1], "bfloat16", 2),
        "own_rank": published("own_rank", main.joint_own_rank[2], at=3),
        "path": published("path", [main.path[1][0] + 0.09, main.path[1][1]], at=2),
        "path beyond": published("path", [main.path[1][0] + 0.11, main.path[1][1]], at=2),
        "layer that is not there": published("rank", 3.0, at=4),
    }[figure]
    assert compare(made, layers, "float32").verdict == verdict


@pytest.fixture(scope="module")
def layers():
    lin = loclin.linearize(tiny.llama(dtype=torch.float32), tiny.prompt(4))
    return lin.explain_layers(k=2, signs="final")


def test_words_of_layers_are_compared(layers):
    words = [word for word, _ in layers.main.joint_vectors[1][0].writes]
    assert compare(published("layer_words", words[:1], at=[2, 1]), layers, "float32").verdict == "agree"
    assert compare(published("layer_words", ["nothing"], at=[2, 1]), layers, "float32").verdict == "differ"
    first = layers.main.token_vectors[2][0][0].writes[0][0]
    assert compare(published("table_word", first, "unknown", 3), layers, "float32").verdict == "agree"


def steered(normal: str, written: str) -> Steered:
    texts = (Continuation(text, [1], False, 1.0, 0.0, 5.0) for text in (normal, written))
    return Steered("p", ["t"], ["w"], "published", 1, 0.5, "add", *texts, 0.0, 0.0, None, provenance(["a"]), {}, [])


def test_steered_texts_agree_by_their_first_half():
    (setting,) = [one for one in GOLDEN.steering if one.model == "Qwen3-8B"]
    agree, differ = compare_steering(setting, steered(" another scene", " Golden Gate Bridge on a wall"))
    assert (agree.verdict, differ.verdict) == ("agree", "differ")
    assert "3 are" in agree.tolerance
    (gemma,) = [one for one in GOLDEN.steering if one.model == "gemma-3-12b-it"]
    assert len(compare_steering(gemma, steered("", "10th anniversary of"))) == 1  # unsteered, another prompt was run


def test_the_steering_layer_is_the_one_that_ran():
    llama = GOLDEN.steering[0]
    assert (llama.place(32), llama.printed_place(32)) == (21, 23)  # counted from 0; the paper prints the 24th
    assert 1 <= llama.place(2) <= 1


def merge_slowly(scores: np.ndarray, k: int) -> list[int]:
    """The published function, one comparison after the other."""
    values, ids = [-np.inf] * k, [0] * k
    for start in range(0, len(scores), PART):
        both = values + scores[start : start + PART].tolist()
        order = sorted(range(len(both)), key=lambda i: -both[i])[:k]
        ids = [ids[place] if i < k else start + i - k for place, i in enumerate(order)]
        values = [both[i] for i in order]
    return ids


def test_lists_are_merged_as_the_published_code_does():
    scores = torch.randn(4 * PART + 17, generator=torch.Generator().manual_seed(3))
    right, wrong = scores.topk(8).indices.tolist(), merge_wrongly(scores, 8).tolist()
    assert wrong == merge_slowly(scores.numpy(), 8)
    assert wrong[0] == right[0]
    assert wrong != right


def test_rows_are_those_of_the_largest_columns():
    lin = loclin.linearize(tiny.llama(dtype=torch.float32), tiny.prompt(4))
    found = repeat_mistakes(lin, k=3)
    maps = lin.jacobian().dense()
    for t, one in enumerate(found.tokens):
        assert one.units == maps[:, t].norm(dim=0).topk(3).indices.tolist()
        assert [len(words) for words in one.rows] == [4, 4, 4]
        assert [len(words) for words in one.reads] == [8, 8, 8]
    assert any(
        one.units != maps[:, t].norm(dim=1).topk(3).indices.tolist() for t, one in enumerate(found.tokens)
    )  # so they are not the largest rows
