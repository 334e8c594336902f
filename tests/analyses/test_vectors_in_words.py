"""Single vectors have words of their own; near-equal ones are one block, and a map that is zero has none."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.analyses.decode import Decoder, Triples, put_into_words
from loclin.models import wrap

K = 3


@pytest.fixture(scope="module")
def decoder():
    return Decoder(wrap(tiny.llama()))


@pytest.fixture
def triples(decoder):
    """The triples of a random map, the second and third as one block."""
    d = decoder.model.hf.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(d, d, generator=generator, dtype=decoder.model.hf.dtype))
    return Triples(U[:, :K], S[:K], Vh[:K], torch.randn(d, generator=generator).to(U), [[0], [1, 2]])


def assert_same(words, expected):
    assert [text for text, _ in words] == [text for text, _ in expected]
    assert [score for _, score in words] == pytest.approx([score for _, score in expected])


def test_single_vectors_and_blocks(decoder, triples):
    ((single, block),) = put_into_words([triples], decoder, 4)
    assert (single.indices, block.indices) == ([0], [1, 2])
    assert single.values == triples.S[:1].tolist()
    assert block.values == triples.S[1:].tolist()
    assert single.gain == pytest.approx((triples.Vh[0] @ triples.x).item())
    assert block.gain is None
    assert_same(single.writes, decoder.writes(triples.U[:, :1].T, 4)[0])
    assert_same(single.reads, decoder.reads(triples.Vh[:1], 4)[0])
    assert_same(block.writes, decoder.writes_subspace(triples.U[:, 1:], 4))
    assert_same(block.reads, decoder.reads_subspace(triples.Vh[1:].T, 4))


def test_joint_maps_read_nothing_and_zero_maps_have_no_vectors(decoder, triples):
    joint = Triples(triples.U, triples.S, None, None, triples.blocks)
    zero = Triples(triples.U, torch.zeros_like(triples.S), triples.Vh, triples.x, triples.blocks)
    found, none = put_into_words([joint, zero], decoder, 4)
    assert [(block.reads, block.gain) for block in found] == [([], None)] * 2
    for block, other in zip(found, put_into_words([triples], decoder, 4)[0], strict=True):
        assert_same(block.writes, other.writes)
    assert none == []
    assert put_into_words([zero], decoder, 4) == [[]]
