"""Both packaged tokenizers: what is shown of any text, and the text itself."""

from __future__ import annotations

import pytest

import loclin
from loclin.errors import OptionError
from loclin.report.text import visible

pytestmark = pytest.mark.real
TEXTS = [
    "The Golden Gate",
    "😀 and 👩‍👩‍👧 x",
    "桥梁 漢字かな",
    "naïve café, Zoë",
    "e\u0301 o\u0308 combined",
    "שלום עולם مرحبا",
    "a\n\nb\t  c\r\n",
]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def model(request):
    return loclin.load(request.param)


def test_no_two_tokens_look_the_same(model):
    shown = model.decode_each(range(len(model.tokenizer) + 2))
    assert len(set(shown)) == len(shown)
    raws = model.tokenizer.convert_ids_to_tokens(
        [i for i, text in enumerate(shown) if "\N{REPLACEMENT CHARACTER}" in text]
    )
    assert all("\N{REPLACEMENT CHARACTER}" in raw or raw.startswith("ï¿½") for raw in raws), "the sign itself"


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_offsets_cover_it(model, text):
    ids = model.encode(text, bos=False)[0].tolist()
    assert model.decode(ids) == text
    spans = model.tokens.offsets(ids)
    assert "".join(text[a:b] for a, b in dict.fromkeys(spans)) == text
    whole = [
        (shown, text[a:b]) for shown, (a, b) in zip(model.decode_each(ids), spans, strict=True) if "⟨" not in shown
    ]
    assert all(shown == part for shown, part in whole)
    for cut in range(1, len(ids)):
        assert model.tokens.continuation(ids[:cut], ids[cut:]) == text[spans[cut][0] :]


def test_readme_s_tokens(model):
    lin = loclin.linearize(model, "The Golden Gate", bos=True)
    assert lin.tokens[1:] == ["The", " Golden", " Gate"]
    assert [visible(text) for text in lin.tokens[1:]] == ["The", "·Golden", "·Gate"]
    assert lin.text == f"{lin.tokens[0]}The Golden Gate"
    assert lin.warnings == []


def test_a_word_without_its_space_is_told(model):
    lin = loclin.linearize(model, "The Golden Gate", bos=True)
    assert lin.attribute(" Bridge").warnings == []
    (said,) = lin.attribute("Bridge").warnings
    if model.info.name == "smollm2-135m":  # has no such token: the target is the sum over its pieces
        assert "' Bridge', with a space in front, is a token" in said
        return
    assert "'Bridge' is not the predicted token: that is ' Bridge', with a space in front" in said


def test_what_broken_bytes_are_decoded_to_is_no_target(model):
    lin = loclin.linearize(model, "The Golden Gate", bos=True)
    with pytest.raises(OptionError, match=r"\d+ tokens are this text, with the ids"):
        lin.attribute("\N{REPLACEMENT CHARACTER}")


def test_a_sink_without_a_beginning_token_is_told(model):
    lin = loclin.linearize(model, "The Golden Gate", bos=False)
    assert [("attention sink" in text) for text in lin.warnings] == [True] * (0 in lin.sinks)
    assert 0 in lin.sinks or model.info.name != "smollm2-135m"
