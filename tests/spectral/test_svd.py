"""Spectra agree with dense linear algebra, and say what is not defined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.spectral import SVD, stable_rank, svd


@pytest.fixture(scope="module")
def J():
    return linearize(tiny.gemma3(), tiny.prompt(5), precision="double").jacobian()


def test_every_token_s_triples(J):
    found = J.svd(k=6)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((5, 24, 6), (5, 6), (5, 6, 24))
    for i in range(5):
        matrix = J.dense()[:, i]
        assert found.S[i].tolist() == pytest.approx(torch.linalg.svdvals(matrix)[:6].tolist(), rel=1e-10)
        assert torch.allclose(matrix @ found.Vh[i].T, found.U[i] * found.S[i], atol=1e-10)
        assert (J.value @ found.U[i] >= 0).all()
    assert (found.residuals < 1e-10 * found.S[:, :1]).all()


def test_joint_triples(J):
    found = J.svd(k=4, joint=True)
    matrix = J.dense().flatten(1)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((24, 4), (4,), (4, 5, 24))
    assert found.S.tolist() == pytest.approx(torch.linalg.svdvals(matrix)[:4].tolist(), rel=1e-10)
    assert torch.allclose(matrix @ found.Vh.flatten(1).T, found.U * found.S, atol=1e-10)


def test_norms_and_ranks(J):
    for i in range(5):
        values = torch.linalg.svdvals(J.dense()[:, i])
        assert J.singular_values()[i].tolist() == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)
        assert J.frobenius_norm()[i].item() == pytest.approx(values.square().sum().sqrt().item())
        assert J.stable_rank()[i].item() == pytest.approx((values.square().sum() / values[0] ** 2).item())


def test_zero_maps_have_rank_zero():
    J = linearize(tiny.llama(), tiny.prompt(6)).jacobian(position=2)
    assert (J.stable_rank()[3:] == 0).all()
    assert (J.stable_rank()[:3] >= 1).all()
    assert (J.svd(2).S[3:] == 0).all()


@pytest.mark.parametrize("k", [0, -1, 25])
def test_impossible_k_is_refused(J, k):
    with pytest.raises(OptionError, match="24 singular values"):
        J.svd(k)


def test_near_equal_values_are_one_block():
    values = torch.tensor([[5.0, 4.999, 4.998, 2.0, 1.0, 1.0]])
    found = SVD(torch.eye(6)[None], values, torch.eye(6)[None], torch.zeros(1, 6), values)
    assert found.blocks(0) == [[0, 1, 2], [3], [4, 5]]
    assert found.blocks(0, tolerance=0.0) == [[0], [1], [2], [3], [4, 5]]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    tokens=st.integers(1, 3),
    scale=st.integers(-6, 6),
)
def test_residuals_bound_the_error(seed, d_out, d_in, tokens, scale):
    """|s - s_true| never passes the printed residual by more than rounding (Weyl)."""
    dense = (
        torch.randn(d_out, tokens, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * 10.0**scale
    )
    k = min(d_out, d_in)
    found = svd(dense.float(), k, torch.ones(d_out))
    for i in range(tokens):
        true = torch.linalg.svdvals(dense[:, i].float().double())[:k]
        slack = 1e-5 * true[0]
        assert ((found.S[i].double() - true).abs() <= found.residuals[i] + slack).all()


def test_stable_rank_of_known_spectra():
    assert stable_rank(torch.tensor([2.0, 3.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])).tolist() == [4.0, 1.0, 0.0]
