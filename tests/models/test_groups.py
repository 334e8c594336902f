"""Groups of tokens: their shares are sums of their tokens' shares, and every token is in exactly one."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

import loclin
from loclin.analyses.attribution.groups import UNITS, find_groups
from loclin.analyses.attribution.result import KINDS, Attribution
from loclin.errors import OptionError
from loclin.models import wrap
from loclin.results import display

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


def test_examples_are_between_empty_lines():
    lin = at("a: b\nc\n\nd: e\n \n\nf:")
    assert names(lin, "example") == ["<s>", "a: b\nc\n\n", "d: e\n \n\n", "f:"]


def test_a_span_of_characters(lin):
    start = lin.text.index("Golden")
    found = find_groups(lin, {"the bridge": slice(start, start + len("Golden Gate"))})
    assert [group.name for group in found] == ["other tokens", "the bridge"]
    assert "".join(lin.tokens[i] for i in found[1].positions) == "Golden Gate"


@pytest.fixture(scope="module")
def short():
    return at("It is a Gate.")


@pytest.mark.slow
def test_the_same_groups_wherever_tokens_have_shares(short):
    """Sums of each result's own shares, in its groups, on its page."""
    pattern = re.compile("is a")
    first, chosen, *_ = groups = find_groups(short, pattern)
    assert (first.name, chosen.name) == ("other tokens", "is a")
    found, head, path = (
        short.explain(k=1, group=pattern),
        short.head(1, 2, group=pattern),
        short.path(["L1H2"], group=pattern),
    )
    assert found.groups == head.groups == path.groups == groups
    own = ([part.share for part in found.tokens], head.attends.tolist(), path.shares.tolist())
    written = short.generate(1, k=1, group=pattern).steps[0]
    for result, shares in zip((found, head, path, written), (*own, own[0]), strict=True):
        assert re.search(rf"is·a +\{sum(shares[i] for i in chosen.positions):+.3f}", shown(result))
    assert found.group_shares == pytest.approx([sum(own[0][i] for i in group.positions) for group in groups])


@pytest.mark.slow
def test_skipped_tokens_are_not_ranked_in_explanations(short):
    found = short.explain(k=1, skip="special", group="word")
    assert found.skipped == [0]
    table = shown(found).split("Which tokens")[1].split("the total is")[0]
    assert "<s>" not in table
    assert "1 others" in table  # they are summed up, so that the total stays


def test_prompts_are_compared_by_any_unit(lin):
    other = at(TEXT.replace("Golden", "old"))
    for unit in (*UNITS, re.compile("Gate")):
        found = lin.compare_prompts(other, 5, align=unit, skip="special")
        assert abs(found.residual) < 1e-11
        assert sorted(i for pair in found.pairs for i in pair.at) == list(range(len(lin.tokens)))
        named = [group.name for group in find_groups(lin, unit, [0])]
        assert [pair.first for pair in found.pairs if pair.at] == named
        assert [found.pairs[i].at for i in found.skipped] == [[0]]


def shown(result):
    console = Console(file=(out := io.StringIO()), width=200)
    display.show(result, console)
    return out.getvalue()


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
        ({"by": {"a": slice(900, 910)}}, "group 'a': no token begins in characters 900 to 910"),
        ({"skip": "stop words"}, "choose special, sink, or give positions"),
    ],
)
def test_mistakes(lin, options, message):
    with pytest.raises(OptionError, match=message):
        lin.attribute(5, **options)


def test_positions_outside(lin):
    with pytest.raises(loclin.PromptError, match="outside the prompt"):
        lin.attribute(5, by={"a": [999]})
