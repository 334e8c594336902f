"""Groups of tokens: their shares are sums of their tokens' shares, and every token is in exactly one."""

from __future__ import annotations

import re

import pytest
import torch

import loclin
from loclin.analyses.attribution.groups import UNITS, find_groups
from loclin.analyses.attribution.result import KINDS, Attribution
from loclin.errors import OptionError
from loclin.models import wrap

from .helpers import tiny_llama
from .tokenizers import KINDS as TOKENIZERS

TEXT = "The Golden Gate. Is it a gate?\nIt's  of 1937!\n\n字字 a\N{COMBINING ACUTE ACCENT} …"


def at(text: str, kind: str = "bytes") -> loclin.Linearization:
    return loclin.linearize(
        wrap(tiny_llama(vocab_size=400, max_position_embeddings=128), TOKENIZERS[kind]),
        text,
        bos=True,
        precision="double",
    )


@pytest.fixture(scope="module")
def lin():
    return at(TEXT)


def names(lin, by):
    return [group.name for group in find_groups(lin, by)]


@pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe", "metaspace"])
@pytest.mark.parametrize("by", [*UNITS, re.compile("Gate"), {"a": [1, 3], "b": [0]}])
def test_every_token_is_in_one_group_and_shares_are_sums(kind, by):
    lin = at(TEXT, kind)
    found, tokens = lin.attribute(5, by=by), lin.attribute(5)
    places = [i for group in found.groups for i in group.positions]
    assert sorted(places) == list(range(len(lin.tokens)))
    alone, _ = tokens.by_token()
    shares = found.shares[found.kinds == KINDS.index("group")].tolist()
    assert shares == pytest.approx([sum(alone[i] for i in group.positions) for group in found.groups], abs=1e-13)
    assert found.sum == pytest.approx(tokens.sum, abs=1e-12)
    assert found.relative_residual < 1e-12


def test_words(lin):
    """Words keep their apostrophes, other signs are apart, and spaces belong to the word behind them."""
    assert names(lin, "word") == [
        "<s>", "The", " Golden", " Gate", ".", " Is", " it", " a", " gate", "?", "\nIt's", "  of", " 1937", "!",
        "\n\n字字", " a", "\N{COMBINING ACUTE ACCENT}", " …",
    ]  # fmt: skip


def test_sentences_and_lines(lin):
    assert names(lin, "sentence") == [
        "<s>", "The Golden Gate.", " Is it a gate?", "\nIt's  of 1937!", "\n\n字字 a\N{COMBINING ACUTE ACCENT} …",
    ]  # fmt: skip
    assert names(lin, "line") == [
        "<s>", "The Golden Gate. Is it a gate?\n", "It's  of 1937!\n\n", "字字 a\N{COMBINING ACUTE ACCENT} …",
    ]  # fmt: skip


def test_a_pattern(lin):
    assert names(lin, re.compile(r"Golden|gate")) == ["other tokens", "Golden", "gate"]


def test_turns_end_where_the_model_stops():
    tokenizer = TOKENIZERS["bytes"]
    model = tiny_llama(vocab_size=400, max_position_embeddings=128)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    s, e = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[s, 9, 10, e, 11, s, 12, e, s, 13]])
    lin = loclin.linearize(wrap(model, tokenizer), ids)
    assert [group.positions for group in find_groups(lin, "turn")] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]


def test_what_is_skipped_is_counted_and_not_ranked(lin):
    plain = lin.attribute(5)
    for by in ("token", "word"):
        found = lin.attribute(5, by=by, skip=[0, 1, 2, 3])
        assert found.skipped == [0, 1, 2, 3]
        assert found.sum == pytest.approx(plain.sum, abs=1e-12)
        shown = {i for part in found.top(99) for i in _positions(found, part)}
        assert shown == set(range(4, len(lin.tokens)))
    assert lin.attribute(5, skip="special").skipped == [0]
    assert lin.attribute(5, skip="sink").skipped == lin.sinks


def _positions(found, part):
    return [] if part.kind == "bias" else found.groups[part.index].positions if part.index is not None else [part.token]


def test_saved_and_loaded(lin, tmp_path):
    found = lin.attribute(5, by="word", skip="special")
    for name in ("a.json", "a.safetensors"):
        found.save(tmp_path / name)
        again = Attribution.load(tmp_path / name)
        assert again.parts == found.parts
        assert again.groups == found.groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "verse"}, "choose one of token, layer"),
        ({"by": re.compile("zebra")}, "matches nothing in the prompt"),
        ({"by": {"a": [0, 1], "b": [1]}}, "groups 'a' and 'b' both have the token at position 1"),
        ({"by": "layer", "skip": "sink"}, "skip is about tokens"),
        ({"skip": "stop words"}, "choose special, sink, or give positions"),
    ],
)
def test_mistakes(lin, options, message):
    with pytest.raises(OptionError, match=message):
        lin.attribute(5, **options)


def test_positions_outside(lin):
    with pytest.raises(loclin.PromptError, match="outside the prompt"):
        lin.attribute(5, by={"a": [999]})
