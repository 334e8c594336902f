"""Prompts in every form, and what is said of odd ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, BatchEncoding

import loclin
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.models import wrap
from loclin.steering.steer import steer
from loclin.steering.watch import watch
from loclin.steering.writing import encode_prompt

from .helpers import tiny_llama, tiny_tokenizer
from .tokenizers import ending

IDS = [260, 223, 69, 67, 86]


@pytest.fixture(scope="module")
def model():
    """A tiny model, and room in its vocabulary for more than its tokenizer's tokens."""
    return wrap(tiny_llama(vocab_size=300, pad_token_id=3), tiny_tokenizer(), name="tiny")


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        [IDS],
        tuple(IDS),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        np.array(IDS),
        np.array([IDS], dtype=np.uint16),
        [np.int64(token) for token in IDS],
        [torch.tensor(token) for token in IDS],
        {"input_ids": IDS},
        BatchEncoding({"input_ids": [IDS], "attention_mask": [[1] * 5]}),
        BatchEncoding({"input_ids": [[7, *IDS]], "attention_mask": [[0, 1, 1, 1, 1, 1]]}, tensor_type="pt"),
        {"input_ids": np.array([*IDS, 7]), "attention_mask": np.array([True] * 5 + [False])},
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_ids_in_every_form_are_one_prompt(model, prompt):
    lin = loclin.linearize(model, prompt)
    assert lin.input_ids.tolist() == [IDS]
    assert lin.warnings == loclin.linearize(model, torch.tensor([IDS])).warnings


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (torch.tensor(5), r"shape \[1, T\]"),
        (torch.tensor([[True, False]]), "not bool"),
        ([True, False], "True and False are not token ids"),
        ([260, True], "True and False are not token ids"),
        (np.array([True]), "True and False are not token ids"),
        ([1.5, 2.0], "whole numbers, not float64"),
        (torch.tensor([1.0]), "whole numbers, not float32"),
        (np.array(7), r"shape \[1, T\]"),
        ([[1, 2], [3]], "one list of whole numbers"),
        ([[1, 2], [3, 4]], r"shape \[1, T\]"),
        ([None, 3], "one list of whole numbers"),
        ([], r"shape \[1, T\]"),
        (torch.tensor([], dtype=torch.long), r"shape \[1, T\]"),
        (["the", "cat"], "linearize_batch"),
        ({"ids": [3]}, "no input_ids"),
        ([300], "from 0 to 299"),
        ([-1], "from 0 to 299"),
    ],
)
def test_what_is_no_prompt_is_refused(model, prompt, why):
    with pytest.raises(PromptError, match=why):
        loclin.linearize(model, prompt)


@pytest.mark.slow
def test_a_batch_takes_every_form_too(model):
    rows = model.tokenizer(["the cat", "the"], padding=False)["input_ids"]
    expected = [[row] for row in rows]
    width = len(rows[0])
    mask = [[1] * width, [1] + [0] * (width - 1)]
    filled = [rows[0], rows[1] + [3] * (width - 1)]
    for prompts in (
        ["the cat", "the"],
        rows,
        [torch.tensor(row) for row in rows],
        {"input_ids": filled, "attention_mask": mask},
        BatchEncoding({"input_ids": filled, "attention_mask": mask}, tensor_type="pt"),
    ):
        assert [lin.input_ids.tolist() for lin in loclin.linearize_batch(model, prompts)] == expected
    found = loclin.linearize_batch(model, np.array(filled), attention_mask=np.array(mask))
    assert [lin.input_ids.tolist() for lin in found] == expected


def test_one_text_is_no_batch(model):
    with pytest.raises(OptionError, match=r"'the cat' is one text where a list is meant: \['the cat'\]"):
        loclin.linearize_batch(model, "the cat")


def test_an_end_that_the_tokenizer_adds_is_left_out_and_said():
    adding = wrap(tiny_llama(), ending())
    lin = loclin.linearize(adding, "the cat")
    assert lin.tokens[0] == "<s>"
    assert "</s>" not in lin.tokens
    (said,) = lin.prompt_warnings
    assert said.startswith("The tokenizer appends </s> to every text. It is left out")
    assert loclin.linearize(adding, "the cat", bos=True).prompt_warnings == []
    (kept,) = loclin.linearize(adding, adding.tokenizer("the cat")).prompt_warnings
    assert "ends with </s>, which ends a text" in kept
    typed = loclin.linearize(adding, "the</s>")
    assert typed.tokens == ["<s>", "the", "</s>"]
    assert any("ends with </s>" in text for text in typed.prompt_warnings)


def test_every_analysis_passes_warnings_on():
    lin = loclin.linearize(wrap(tiny_llama(max_position_embeddings=64), ending()), "the cat")
    said = lin.warnings
    assert said
    from loclin.analyses.layers import explain_layers

    found = [
        loclin.explain(lin, k=1),
        loclin.generate(lin, 1, k=1).steps[0],
        explain_layers(lin, k=2),
        loclin.validity(lin, draws=1, swaps=0),
        watch(lin, ["the"], k=1),
        lin.attribute(),
        lin.head(0, 0, k=1),
        lin.path(["L0H0"], token=0),
    ]
    for one in found:
        assert [text for text in one.warnings if text in said] == said
        assert one.to_dict()["warnings"] == one.warnings if hasattr(one, "to_dict") else said[0] in one.to_json()
    steered = steer(lin.model, "the cat", ["the the"], words=["the"], layer=0, strength=1.0, max_new_tokens=2)
    assert lin.prompt_warnings[0] in steered.warnings
    assert lin.prompt_warnings[0] in steered.to_dict()["warnings"]


@pytest.mark.slow
def test_every_output_shows_warnings():
    from io import StringIO

    from rich.console import Console

    from loclin.results import display

    lin = loclin.linearize(wrap(tiny_llama(max_position_embeddings=64), ending()), "the cat")
    steered = steer(lin.model, "the cat", ["the the"], words=["the"], layer=0, strength=1.0, max_new_tokens=2)
    generated, moved = loclin.generate(lin, 1, k=1), loclin.validity(lin, draws=1, swaps=0)
    said = "is left out"
    for found in (steered, generated, moved, watch(lin, ["the"], k=1)):
        console = Console(file=StringIO(), width=200)
        display.show(found, console)
        assert said in " ".join(console.file.getvalue().split())
        assert said in display.page(found)
        assert said in display.fragment(found)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([3, 3, 260], "begins with token 3, which is padding"),
        ([260, 3], "ends with token 3, which is padding"),
        ([260, 2], "ends with token 2, which ends a text"),
        ([260, 42], None),
    ],
)
def test_padding_and_ends_in_ids_are_said(ids, said):
    found = loclin.linearize(wrap(tiny_llama(pad_token_id=3), name="bare"), torch.tensor([ids])).prompt_warnings
    assert [said in text for text in found] == ([] if said is None else [True])


def test_padding_that_a_mask_names_is_not_said(model):
    ids = torch.tensor([[3, 3, 260, 223]])
    assert loclin.linearize(model, ids, attention_mask=(ids != 3).long()).prompt_warnings == []


def test_a_beginning_token_that_is_also_padding_is_no_padding():
    tokenizer = tiny_tokenizer(bos=None)
    tokenizer.pad_token = tokenizer.eos_token
    model = wrap(tiny_llama(), tokenizer)
    assert loclin.linearize(model, "the cat", bos=True).prompt_warnings == []
    (said,) = loclin.linearize(model, torch.tensor([[2, 2, 260]])).prompt_warnings
    assert "begins with </s>, which is padding" in said


def test_placeholders_and_ids_without_a_token_are_said():
    hf = tiny_llama(vocab_size=300)
    hf.config.image_token_id, hf.config.audio_token_index = 7, 8
    found = loclin.linearize(wrap(hf, tiny_tokenizer()), torch.tensor([[7, 260, 8, 299]])).prompt_warnings
    assert ["stands for image" in found[0], "stands for audio" in found[1], "Token 299" in found[2]] == [True] * 3
    assert len(found) == 3


@pytest.mark.parametrize("template", ["<s>{{ messages[0].content }}!", "{{ messages[0].content }}!"])
def test_bos_is_what_a_chat_prompt_has(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    model = wrap(tiny_llama(max_position_embeddings=64), tokenizer)
    own = template.startswith("<s>")
    begins = {bos: encode_prompt(model, "the", True, bos)[0].tolist().count(1) for bos in (None, True, False)}
    assert begins == {None: int(own), True: 1, False: 0}
    steered = steer(
        model, "the", ["the the"], words=["the"], layer=0, strength=1.0, max_new_tokens=1, chat=True, bos=True
    )
    assert steered.settings["bos"] is True
    assert steered.provenance.token_ids[0] == model.bos
    assert steered.provenance.token_ids.count(model.bos) == 1


def test_a_saved_operator_s_words_are_its_text_s(tmp_path):
    from loclin.steering import Operator

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "bos", "eos_token": "end"})  # names that read as words
    tokenizer.add_tokens([AddedToken(" bridge", normalized=False)])
    model = wrap(tiny_llama(vocab_size=300, max_position_embeddings=64), tokenizer)
    ids = [model.bos, *model.encode("the bridge", bos=False)[0].tolist(), tokenizer.eos_token_id]
    Operator.make(loclin.linearize(model, ids), 0, rank=1).save(tmp_path / "made.safetensors")
    held = Operator.load(tmp_path / "made.safetensors")
    found = steer(model, "the", operator=held, strength=1.0, max_new_tokens=1)
    assert found.toward == ["the bridge"]
    assert found.words == ["bridge"]


@pytest.mark.slow
def test_generated_text_is_decoded_at_once():
    from loclin.models.tokens import Tokens

    from .tokenizers import KINDS

    model = wrap(AutoModelForCausalLM.from_config(tiny_llama(vocab_size=300).config), KINDS["llama"])
    found = loclin.generate(loclin.linearize(model, "The Gate"), 6, k=1)
    written = [step.target["id"] for step in found.steps]
    prompt = model.encode("The Gate")[0].tolist()
    both = [*prompt, *written]
    tokens: Tokens = model.tokens
    assert found.text == tokens.text(both)[tokens.offsets(both)[len(prompt)][0] :]
    assert found.steps[0].prompt == tokens.text(prompt)


@pytest.mark.slow
def test_random_tokens_of_validity_are_the_tokenizer_s():
    model = wrap(tiny_llama(vocab_size=600), tiny_tokenizer())
    found = loclin.validity(loclin.linearize(model, "the cat"), draws=0, swaps=20)
    drawn = [ray.token for ray in found.rays if ray.kind == "random"]
    assert drawn
    assert not any(text.startswith("⟨unused") for text in drawn)
    assert not set(drawn) & {"<s>", "</s>", "<unk>"}


def test_a_config_may_name_no_padding():
    model = wrap(families.build("rwkv"))
    assert not hasattr(model.hf.config, "pad_token_id")
    assert linearize(model, families.prompt(model.hf, 3), precision="double").certify().passed
