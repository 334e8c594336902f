"""Both packaged models: the operator is exact on its own text, a cache changes nothing, and nor does strength 0."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import loclin
from loclin.cli.steer import steer as steer_command
from loclin.errors import ModelError
from loclin.steering import Operator
from loclin.steering.concepts import packaged_concepts, token_ids
from loclin.steering.steer import steer
from loclin.steering.writing import write

pytestmark = pytest.mark.real
TOWARD, PROMPT = "The bridge out of Marin is the Golden", "Here is a painting of the"
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def model(request):
    return loclin.load(request.param)


@pytest.fixture(scope="module")
def operator(model):
    lin = loclin.linearize(model, TOWARD, bos=True)
    made = Operator.make(lin, 2 * lin.trace.n_layers // 3)
    own, hidden = made.apply_to(lin.embeddings)[-1], lin.value(made.point)[-1]
    assert (own - hidden).norm() < 1e-4 * hidden.norm()
    return made


@pytest.mark.parametrize(("form", "strength"), [("add", 0.8), ("interpolate", 0.7)])
def test_with_and_without_a_cache(model, operator, form, strength):
    ids = model.encode(PROMPT, bos=True)
    with operator.apply(model, strength, form):
        cached, plain = (model.hf.generate(ids, use_cache=cache, **OPTIONS) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("form", "strength"), [("add", 0.0), ("interpolate", 1.0)])
def test_unsteered_gives_the_same_bits(model, operator, form, strength):
    ids = model.encode(PROMPT, bos=True)
    with operator.apply(model, strength, form):
        same = model.hf(ids).logits
    assert torch.equal(same, model.hf(ids).logits)


@pytest.mark.long_for("gemma-3-270m")
def test_a_batch_writes_what_each_prompt_writes_alone(model, operator):
    prompts = [model.encode(prompt, bos=True) for prompt in packaged_concepts().choosing[:3]]
    together = write(model, prompts, [], steering=operator, strength=0.6, max_new_tokens=8)
    alone = [write(model, [ids], [], steering=operator, strength=0.6, max_new_tokens=8)[0] for ids in prompts]
    assert [text.ids for text in together] == [text.ids for text in alone]


def test_every_packaged_word_is_one_token(model):
    for concept in packaged_concepts().concepts:
        for word in concept.words:
            assert len(model.encode(f" {word}", bos=False)[0]) == 1
            assert token_ids(model, [word])


def test_chat_templates(model):
    options = {"layer": 2, "strength": 0.5, "max_new_tokens": 3, "method": "activation", "chat": True}
    if model.tokenizer.chat_template is None:
        with pytest.raises(ModelError, match="no chat template"):
            steer(model, PROMPT, [TOWARD], **options)
    else:
        found = steer(model, PROMPT, [TOWARD], **options)
        assert len(found.steered.ids) <= 3


@pytest.mark.long
def test_the_documented_example_steers(model):
    """The command of docs/steering.md and of `loclin steer --help`, with its defaults, on both packaged models."""
    page = (Path(__file__).parents[2] / "docs" / "steering.md").read_text()
    command = re.search(r'loclin steer "(.*?)" --toward "(.*?)"', page)
    assert command[0] in inspect.getdoc(steer_command)
    found = steer(model, command[1], [command[2]])
    assert found.steered.frequency > found.normal.frequency
    assert found.warnings == []
