"""Decoding is exact at every rank, over the whole vocabulary, however it is cut."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.analyses import decode
from loclin.analyses.decode import Decoder
from loclin.models import wrap


@pytest.fixture(params=[2**28, 300])
def decoder(request, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_BYTES", request.param)
    return Decoder(wrap(tiny.llama()))


def test_writes_are_the_head_s_largest_products(decoder):
    vectors = torch.randn(3, 24, dtype=torch.float64)
    scores = vectors @ decoder.model.hf.lm_head.weight.T
    for words, row in zip(decoder.writes(vectors, 7), scores, strict=True):
        top = row.topk(7)
        assert [text for text, _ in words] == [str(i) for i in top.indices.tolist()]
        assert [score for _, score in words] == pytest.approx(top.values.tolist())


def test_reads_are_the_nearest_embeddings_by_cosine(decoder):
    vectors = torch.randn(3, 24, dtype=torch.float64)
    table = decoder.model.hf.get_input_embeddings().weight
    scores = torch.nn.functional.cosine_similarity(vectors[:, None], table[None], dim=-1)
    for words, row in zip(decoder.reads(vectors, 61), scores, strict=True):
        order = row.sort(descending=True)
        assert [text for text, _ in words] == [str(i) for i in order.indices.tolist()]
        assert [score for _, score in words] == pytest.approx(order.values.tolist())


def test_subspaces_do_not_depend_on_their_basis(decoder):
    basis = torch.linalg.qr(torch.randn(24, 3, dtype=torch.float64)).Q
    turned = basis @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    for words in (decoder.writes_subspace, decoder.reads_subspace):
        here, there = words(basis, 5), words(turned, 5)
        assert [text for text, _ in here] == [text for text, _ in there]
        assert [score for _, score in here] == pytest.approx([score for _, score in there])
        assert all(0 <= score <= 1 + 1e-12 for _, score in here)


def test_a_token_s_own_embedding_is_nearest_to_itself(decoder):
    table = decoder.model.hf.get_input_embeddings().weight.detach()
    for token in (3, 17, 60):
        (words,) = decoder.reads(-2.5 * table[[token]], 1)
        assert words[0][0] != str(token)
        (words,) = decoder.reads(2.5 * table[[token]], 1)
        assert words[0] == (str(token), pytest.approx(1.0))
