"""Norms and ranks are within the errors they state."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.linearization import linearize
from loclin.spectral import effective_rank, stable_rank, stable_rank_and_norm
from spectra import DenseMaps, maps, power_law, true_values


def test_norms_of_a_linear_map():
    J = linearize(tiny.gemma3(), tiny.prompt(5), precision="double").jacobian()
    for i in range(5):
        values = torch.linalg.svdvals(J.dense()[:, i])
        assert J.singular_values()[i].tolist() == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)
        assert J.frobenius_norm()[i].item() == pytest.approx(values.square().sum().sqrt().item())
        assert J.stable_rank()[i].item() == pytest.approx((values.square().sum() / values[0] ** 2).item())
    found = stable_rank_and_norm(J)
    assert torch.allclose(found.stable_rank, J.stable_rank(), rtol=0.02)


def test_zero_maps_have_rank_zero():
    J = linearize(tiny.llama(), tiny.prompt(6)).jacobian(position=2)
    assert (J.stable_rank()[3:] == 0).all()
    assert (J.stable_rank()[:3] >= 1).all()
    assert (J.svd(2).S[3:] == 0).all()
    assert (stable_rank_and_norm(J).stable_rank[3:] == 0).all()


def test_few_columns_give_norms_and_ranks():
    dense = maps(300, 250, [power_law(250, 0.8), power_law(250, 1.1, 1e-3), torch.zeros(1)], dtype=torch.float32)
    true = true_values(dense)
    norm = true.norm(dim=1)
    op = DenseMaps(dense)
    found = stable_rank_and_norm(op)
    assert found.columns == op.columns < 250
    assert torch.allclose(found.largest.double(), true[:, 0], rtol=0.02)
    assert torch.allclose(found.frobenius.double(), norm, rtol=0.02)
    assert torch.allclose(found.stable_rank.double(), stable_rank(norm, true[:, 0]), rtol=0.02, atol=1e-9)
    assert (found.stable_rank_error <= 0.0201).all()
    quick = stable_rank_and_norm(op, certify=False)
    assert (found.failure, quick.failure) == (1e-3, 1.0)
    assert quick.columns <= found.columns
    assert torch.allclose(quick.largest.double(), true[:, 0], rtol=0.01)


def test_ranks_of_known_spectra():
    assert stable_rank(torch.tensor([2.0, 3.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])).tolist() == [4.0, 1.0, 0.0]
    ranks = effective_rank(torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert ranks.tolist() == pytest.approx([3.0, 1.0, 0.0])
