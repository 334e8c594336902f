"""Chats: the template's own ids, with one beginning token."""

from __future__ import annotations

import pytest

import loclin
from loclin.errors import ModelError, PromptError
from loclin.models import wrap

from .helpers import tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "a dog"}]


@pytest.fixture
def model():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return wrap(tiny_llama(max_position_embeddings=128), tokenizer)


def test_ids_are_the_template_s(model):
    lin = loclin.linearize(model, CHAT)
    expected = model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert lin.input_ids[0].tolist() == expected
    assert model.decode(expected).count("<s>") == 1


def test_a_beginning_token_by_option(model):
    bos = model.tokenizer.bos_token_id
    plain = loclin.linearize(model, CHAT).input_ids[0].tolist()
    assert loclin.linearize(model, CHAT, bos=True).input_ids[0].tolist() == plain  # the template has one
    assert loclin.linearize(model, CHAT, bos=False).input_ids[0].tolist() == plain[1:]
    model.tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert loclin.linearize(model, CHAT).input_ids[0, 0] != bos
    assert loclin.linearize(model, CHAT, bos=True).input_ids[0].tolist() == plain


def test_the_assistant_s_last_turn_goes_on(model):
    lin = loclin.linearize(model, [*CHAT, {"role": "assistant", "content": "the"}])
    assert model.decode(lin.input_ids[0].tolist()).endswith("assistant: the")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": None}], "message 0 .'user'. has no text"),
        ([{"role": "user"}], "message 0 .'user'. has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 .'user'. has no text"),
        ([{"role": "tool", "content": "x"}], "refuses these messages: no tools here"),
    ],
)
def test_messages_that_are_refused(model, messages, message):
    with pytest.raises(PromptError, match=message):
        loclin.linearize(model, messages)


def test_without_a_template():
    with pytest.raises(ModelError, match="has no chat template"):
        loclin.linearize(wrap(tiny_llama(), tiny_tokenizer()), CHAT)


def test_a_mask_is_refused(model):
    with pytest.raises(PromptError, match="chats have no padding"):
        loclin.linearize(model, CHAT, attention_mask=[[1]])
