"""From prompts to token ids, with and without a beginning token."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from loclin.errors import ModelError, PromptError
from loclin.models import Model, wrap

from .helpers import tiny_llama, tiny_tokenizer

UNK, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def model() -> Model:
    """A model whose tokenizer adds nothing by itself."""
    return wrap(tiny_llama(), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def adding() -> Model:
    """A model whose tokenizer puts <s> in front by itself, as Gemma's and Llama's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return wrap(tiny_llama(), tokenizer, name="tiny")


def plain(model: Model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_are_a_long_row_on_the_models_device(model):
    ids = model.encode("the cat")
    assert ids.dtype == torch.int64
    assert ids.shape == (1, len(plain(model, "the cat")))
    assert ids.device == model.device
    assert model.tokenizer.decode(ids[0]) == "the cat"


@pytest.mark.parametrize(
    ("bos", "front", "front_adding"),
    [(None, [], [BOS]), (False, [], []), (True, [BOS], [BOS]), ("</s>", [EOS], [EOS])],
)
def test_the_beginning_token_is_as_asked(model, adding, bos, front, front_adding):
    assert model.encode("the cat", bos=bos).tolist() == [front + plain(model, "the cat")]
    assert adding.encode("the cat", bos=bos).tolist() == [front_adding + plain(model, "the cat")]


@pytest.mark.parametrize("bos", [None, True, False, "<s>"])
def test_a_beginning_token_in_the_text_is_not_doubled(model, adding, bos):
    expected = [[BOS, *plain(model, "the cat")]]
    assert model.encode("<s>the cat", bos=bos).tolist() == expected
    assert adding.encode("<s>the cat", bos=bos).tolist() == expected


def test_a_repeated_first_word_is_kept(model):
    ids = plain(model, "aa")
    assert ids[0] == ids[1]
    assert model.encode("aa").tolist() == [ids]


def test_without_a_bos_token_the_end_of_text_token_begins():
    model = wrap(tiny_llama(), tiny_tokenizer(bos=None))
    assert model.bos == EOS
    assert model.encode("a", bos=True)[0, 0] == EOS


def test_without_any_such_token_bos_true_is_an_error():
    model = wrap(tiny_llama(), tiny_tokenizer(bos=None, eos=None))
    assert model.bos is None
    with pytest.raises(PromptError, match="names no beginning-of-text token"):
        model.encode("a", bos=True)
    assert model.encode("a", bos="<s>")[0, 0] == BOS


def test_an_unknown_token_is_an_error(model):
    with pytest.raises(PromptError, match=r"does not know the token '<nope>'"):
        model.encode("a", bos="<nope>")


@pytest.mark.parametrize("bos", [None, True, False, "<s>"])
def test_an_empty_prompt_is_an_error(model, adding, bos):
    for each in (model, adding):
        with pytest.raises(PromptError, match="empty"):
            each.encode("", bos=bos)


@pytest.mark.parametrize("bos", [None, True, False])
def test_a_prompt_without_tokens_is_an_error(bos):
    tokenizer = tiny_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(PromptError, match="no tokens"):
        wrap(tiny_llama(), tokenizer).encode("  ", bos=bos)


def test_the_context_length_is_the_limit_and_both_lengths_are_said(model):
    assert model.encode("z" * 16).shape == (1, 16)
    with pytest.raises(PromptError, match="17 tokens; tiny takes at most 16"):
        model.encode("z" * 17)
    with pytest.raises(PromptError, match="17 tokens; tiny takes at most 16"):
        model.encode("z" * 16, bos=True)


def test_a_tokenizer_of_another_model_is_noticed():
    model = wrap(tiny_llama(vocab_size=100), tiny_tokenizer())
    with pytest.raises(PromptError, match="give the model's own tokenizer"):
        model.encode("the cat the")


def test_without_a_tokenizer_token_ids_are_asked_for():
    with pytest.raises(ModelError, match="pass token ids"):
        wrap(tiny_llama()).encode("the cat")
