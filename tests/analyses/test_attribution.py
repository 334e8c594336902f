"""An attribution keeps its numbers: saved and loaded, as a table, as JSON, by name."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from loclin import compare
from loclin.analyses.attribution.result import Attribution
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.models import wrap

LEVELS = ("token", "bias", "layer", "head", "neuron", "token×layer")


@pytest.fixture(scope="module")
def lin():
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    return linearize(wrap(tiny.llama(biases=True), fast), "w5 w9 w11 w20 w7", precision="double")


@pytest.fixture(scope="module", params=LEVELS)
def found(request, lin) -> Attribution:
    return lin.attribute("w4", by=request.param)


def test_saved_and_loaded(found, tmp_path):
    found.save(tmp_path / "shares.safetensors")
    again = Attribution.load(tmp_path / "shares.safetensors")
    assert again.parts == found.parts
    assert again.to_dict() == found.to_dict()
    assert not compare(again, found).provenance
    assert compare(again, found).errors["shares"] == 0


def test_as_json(found):
    read = json.loads(found.to_json())
    assert sum(row["share"] for row in read["parts"]) == pytest.approx(read["target"]["value"], rel=1e-12)
    assert read["sum"] + read["residual"] == pytest.approx(read["target"]["value"], rel=1e-12)
    assert read["by"] == found.by
    assert read["target"]["tokens"] == [" w4"]
    assert read["provenance"]["tokens"] == [" w5", " w9", " w11", " w20", " w7"]
    assert read["provenance"]["target"] == "logits"


def test_as_a_table(found):
    pytest.importorskip("pandas")
    table = found.to_dataframe()
    assert len(table) == len(found)
    assert table["share"].sum() == pytest.approx(found.value, rel=1e-12)
    assert (table["text"].notna() == table["token"].notna()).all()


def test_names(lin):
    assert [part.name for part in lin.attribute(by="token").parts][:5] == [" w5", " w9", " w11", " w20", " w7"]
    heads = [part.name for part in lin.attribute(by="head").parts]
    assert heads[:7] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "model.layers.0.self_attn.o_proj.bias", "mlp_out.0"]
    assert lin.attribute(by="neuron").parts[2].name == "L0N0"
    assert {part.name for part in lin.attribute(by="token×layer").parts} >= {"embed", "attn_out.2", "mlp_out.2"}


@pytest.mark.parametrize("spelling", ["token×layer", "token x layer", "token*layer", "tokenxlayer", "token × layer"])
def test_spellings(lin, spelling):
    assert lin.attribute(by=spelling, in_words=0).by == "token×layer"


def test_the_largest_come_with_words(lin):
    found = lin.attribute("w4", by="head", in_words=3)
    top = found.top(3, "head")
    assert [part.share for part in top] == sorted((p.share for p in top), key=abs, reverse=True)
    assert all(len(part.writes) == 8 and len(part.attends) == 5 for part in top)
    assert sum(part.writes is not None for part in found.parts) == 3
    norm, head = lin.model.hf.model.norm.weight, lin.model.hf.lm_head.weight
    best = lin.attribute("w4", by="layer", in_words=1)
    (largest,) = (part for part in best.parts if part.writes)
    written = lin.value(largest.name)[-1] if "." in largest.name else lin.embeddings[-1]
    assert largest.writes[0][0] == lin.model.decode_each([(head @ (norm * written)).argmax().item()])[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra", "target 'zebra' is not a token: '<unk>'"),
        ("", "target '' is 0 tokens, not one: nothing"),
    ],
)
def test_texts_that_are_not_one_token(lin, text, message):
    with pytest.raises(OptionError, match=message):
        lin.attribute(text)
    with pytest.raises(OptionError, match=message):
        lin.attribute(("w4", text))


def test_a_head_is_looked_at_for_a_target_at_one_position(lin):
    with pytest.raises(OptionError, match="for targets at one position"):
        lin.head(0, 0, "w3 w4")


def test_texts_are_ids(lin):
    assert torch.equal(lin.attribute("w4").shares, lin.attribute(6).shares)
    assert lin.attribute(6).target["tokens"] == [" w4"]
