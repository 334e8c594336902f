"""Tokens as they are shown, each distinct, and as the text that they are together."""

from __future__ import annotations

import random

import pytest
import torch

import loclin
from loclin.errors import OptionError
from loclin.models import wrap
from loclin.models.tokens import Tokens
from loclin.report.text import visible

from .helpers import tiny_llama
from .tokenizers import KINDS, ending

TEXTS = ["The Golden Gate.", "the gates  of", "😀 é字\n e\u0301", "שלום a", "Gate Gate", "👩‍👧", " .", "a" * 30]
SPACED = ("unigram", "bpe", "llama", "metaspace")


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_tokens_look_the_same(kind):
    tokens = Tokens(KINDS[kind])
    shown = tokens.shown(range(len(KINDS[kind]) + 3))
    assert len(set(shown)) == len(shown)
    assert len(set(map(visible, shown))) == len(shown)
    assert all(shown)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


@pytest.mark.parametrize("kind", SPACED)
def test_a_piece_carries_the_space_that_it_stands_for(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer.convert_tokens_to_ids(["▁Gate", "Gate", "▁", "a"])
    assert Tokens(tokenizer).shown(ids) == [" Gate", "Gate", " ", "a"]


def test_a_wordpiece_carries_the_space_that_it_stands_for():
    tokenizer = KINDS["wordpiece"]
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "the", "gate", "##gate", ".", "##."])
    assert Tokens(tokenizer).shown(ids) == ["[CLS]", " the", " gate", "gate", " .", "."]


@pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe", "llama"])
def test_the_bytes_of_a_sign_are_told_apart(kind):
    tokens = Tokens(KINDS[kind])
    ids = KINDS[kind]("😀", add_special_tokens=False)["input_ids"]
    assert "".join(tokens.shown(ids)).lstrip() == "⟨F0⟩⟨9F⟩⟨98⟩⟨80⟩"
    assert tokens.text(ids).lstrip() == "😀"


def test_a_byte_that_another_token_writes_is_shown_as_a_byte():
    tokenizer = KINDS["llama"]
    ids = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0x61>", "a", "<0x20>", "▁"])
    assert Tokens(tokenizer).shown(ids) == ["\n", "⟨61⟩", "a", "⟨20⟩", " "]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_decoded_at_once_and_offsets_cover_it(kind):
    tokenizer, tokens = KINDS[kind], Tokens(KINDS[kind])
    draw = random.Random(0)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    rows += [[draw.randrange(len(tokenizer)) for _ in range(12)] for _ in range(60)]
    for ids in rows:
        text, spans = tokens.text(ids), tokens.offsets(ids)
        assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert len(spans) == len(ids)
        assert "".join(text[a:b] for a, b in dict.fromkeys(spans)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_what_the_text_gains(kind):
    tokenizer, tokens = KINDS[kind], Tokens(KINDS[kind])
    for text in TEXTS[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for cut in range(1, len(ids)):
            start = tokens.offsets(ids)[cut][0]
            assert tokens.continuation(ids[:cut], ids[cut:]) == tokens.text(ids)[start:]


def test_special_tokens_are_left_out_of_words():
    tokenizer = ending()
    ids = tokenizer("the cat")["input_ids"]
    tokens = Tokens(tokenizer)
    assert tokens.text(ids) == "<s>the cat</s>"
    assert tokens.text(ids, special=False) == "the cat"
    assert tokens.continuation(ids[:2], ids[2:], special=False) == " cat"


def test_ids_without_a_token_are_marked():
    model = wrap(tiny_llama(vocab_size=300), KINDS["bytes"])
    known = len(model.tokenizer)
    assert model.decode_each([known, known + 1]) == [f"⟨unused {known}⟩", f"⟨unused {known + 1}⟩"]
    the = model.encode("the")[0].tolist()
    assert model.decode([*the, known, *the]) == f"the⟨unused {known}⟩the"
    spans = model.tokens.offsets([*the, known, *the])
    assert [b - a for a, b in spans] == [3, len(f"⟨unused {known}⟩"), 3]


def test_the_head_s_unused_rows_are_no_words():
    model = wrap(tiny_llama(vocab_size=300), KINDS["bytes"])
    lin = loclin.linearize(model, "the cat")
    shown = [text for text, _ in lin.next_tokens(300)]
    assert sum(text.startswith("⟨unused") for text in shown) == 300 - len(model.tokenizer)
    assert len(set(shown)) == 300


def test_tokens_added_later_are_seen():
    from .helpers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokens, new = Tokens(tokenizer), len(tokenizer)
    assert tokens.shown([new]) == [f"⟨unused {new}⟩"]
    tokenizer.add_tokens(["bridge"])
    assert tokens.shown([new]) == ["bridge"]


def test_without_a_tokenizer_ids_are_numbers():
    tokens = Tokens(None)
    assert tokens.shown([3, 14]) == ["3", "14"]
    assert tokens.text([3, 14]) == "3 14"
    assert tokens.offsets([3, 14]) == [(0, 1), (1, 4)]


@pytest.mark.parametrize(
    ("kind", "text", "token"),
    [("llama", " Gate", "▁Gate"), ("llama", "Gate", "Gate"), ("wordpiece", " gate", "gate"), ("wordpiece", "s", "##s")],
)
def test_a_target_is_the_token_that_is_shown_so(kind, text, token):
    model = wrap(tiny_llama(vocab_size=300), KINDS[kind])
    lin = loclin.linearize(model, torch.tensor([[4, 5, 6]]))
    found = lin.attribute(text)
    assert found.target["ids"] == [model.tokenizer.convert_tokens_to_ids(token)]
    assert found.target["tokens"] == [text]


def test_a_byte_can_be_named_as_it_is_shown():
    lin = loclin.linearize(wrap(tiny_llama(), KINDS["bytes"]), "the cat")
    ids = lin.model.encode("é")[0].tolist()
    assert [lin.attribute(text).target["ids"] for text in lin.model.decode_each(ids)] == [[i] for i in ids]


@pytest.mark.parametrize("text", ["\N{REPLACEMENT CHARACTER}"])
def test_a_target_that_many_tokens_are_is_refused_with_their_ids(text):
    lin = loclin.linearize(wrap(tiny_llama(), KINDS["bytes"]), "the cat")
    with pytest.raises(OptionError, match=r"128 tokens are this text, with the ids \d+, \d+, \d+ …"):
        lin.attribute(text)


def test_an_empty_target_is_none():
    lin = loclin.linearize(wrap(tiny_llama(), KINDS["bytes"]), "the cat")
    with pytest.raises(OptionError, match="0 tokens, not one"):
        lin.attribute("")


def test_a_word_that_is_a_token_with_its_space_alone_is_that_token():
    for kind, text, token in (("unigram", "The", "▁The"), ("wordpiece", "golden", "golden")):
        lin = loclin.linearize(wrap(tiny_llama(vocab_size=300), KINDS[kind]), torch.tensor([[4, 5, 6]]))
        assert lin.attribute(text).target["ids"] == [lin.model.tokenizer.convert_tokens_to_ids(token)]
        assert lin.attribute(text).target["tokens"] == [f" {text}"]


def test_a_target_that_is_a_token_without_its_space_alone_says_so():
    lin = loclin.linearize(wrap(tiny_llama(), KINDS["bytes"]), "the cat")
    found = lin.attribute(" c")
    assert found.target["tokens"] == [" ", "c"]
    assert any("2 tokens: ' ' + 'c'; 'c', without a space in front, is a token" in text for text in found.warnings)


def test_a_target_that_differs_from_the_prediction_by_a_space_says_so():
    model = wrap(tiny_llama(vocab_size=300, tie_word_embeddings=False), KINDS["llama"])
    spaced, bare = model.tokenizer.convert_tokens_to_ids(["▁Gate", "Gate"])
    lin = loclin.linearize(model, torch.tensor([[4, 5, 6]]))
    final = lin.value("final")[-1]
    with torch.no_grad():
        model.hf.lm_head.weight[spaced] = final  # now it is predicted
    lin = loclin.linearize(model, torch.tensor([[4, 5, 6]]))
    assert lin.next_tokens(1)[0][0] == " Gate"
    for target in ("Gate", ("Gate", " Gate"), loclin.Margin("Gate")):
        (said,) = lin.attribute(target).warnings
        assert "' Gate', with a space in front" in said
        assert f"id {spaced}" in said
    assert lin.head(0, 0, "Gate", k=1).warnings == [said]
    assert lin.path(["L0H0"], "Gate").to_dict()["warnings"] == [said]
    assert lin.attribute(bare).warnings == [said]
    for target in (" Gate", spaced, None, "a"):
        assert lin.attribute(target).warnings == []
