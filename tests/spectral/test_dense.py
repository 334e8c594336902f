"""Dense routes agree with LAPACK in float64, and their bounds hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.spectral import block_krylov_svd, gram_svd, lapack_svd, singular_values
from spectra import DESIGNS, DenseMaps, maps, power_law, true_values


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
    assert torch.allclose(found.frobenius, J.frobenius_norm())


def test_joint_triples(J):
    found = J.svd(k=4, joint=True)
    matrix = J.dense().flatten(1)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((24, 4), (4,), (4, 5, 24))
    assert found.S.tolist() == pytest.approx(torch.linalg.svdvals(matrix)[:4].tolist(), rel=1e-10)
    assert torch.allclose(matrix @ found.Vh.flatten(1).T, found.U * found.S, atol=1e-10)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_impossible_k_is_refused(J, k):
    with pytest.raises(OptionError, match="24 singular values"):
        J.svd(k)
    with pytest.raises(OptionError, match="24 singular values"):
        block_krylov_svd(J.dense(), k, align_to=J.value)


def test_impossible_tolerance_is_refused():
    with pytest.raises(OptionError, match=r"float32 holds no less than 6\.0e-06"):
        block_krylov_svd(torch.eye(4)[:, None], 1, align_to=torch.ones(4), tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_top_is_certified(design, joint, dtype):
    dense = maps(60, 70, DESIGNS[design], dtype=dtype)
    true = true_values(dense, joint)[..., :4]
    towards = torch.randn(60, dtype=dtype)
    found = block_krylov_svd(dense, 4, align_to=towards, tolerance=1e-3, joint=joint)
    assert ((found.lower <= true) & (true <= found.upper)).all()
    certain = 1e-3 * found.S[..., :1] < found.S
    assert (found.relative_error[certain] < 1.1e-3).all()
    assert (torch.einsum("o,...ok->...k", towards, found.U) >= -1e-5).all()
    gram = found.U.mT @ found.U
    assert torch.allclose(gram, torch.eye(4, dtype=dtype).expand_as(gram), atol=1e-5)


def test_top_does_not_fall_back_and_repeats_itself(monkeypatch):
    dense = maps(160, 150, [power_law(150, 1.0), power_law(150, 0.7)], dtype=torch.float32)
    monkeypatch.setattr("loclin.spectral.dense._lapack_triples", None)
    found, again = (block_krylov_svd(dense, 2, align_to=torch.ones(160), tolerance=1e-2, seed=3) for _ in range(2))
    true = true_values(dense)[:, :2]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert torch.equal(found.U, again.U)
    assert found.method == "block_krylov"


def test_all_values():
    dense = maps(20, 30, [torch.zeros(20), power_law(20, 1)])
    assert torch.allclose(singular_values(dense), true_values(dense))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 40),
    tokens=st.integers(1, 3),
    exponent=st.floats(0, 3),
    scale=st.integers(-6, 6),
    route=st.sampled_from([lapack_svd, block_krylov_svd]),
    joint=st.booleans(),
    double=st.booleans(),
)
def test_bounds_are_never_violated(seed, d_out, d_in, tokens, exponent, scale, route, joint, double):
    """Rounding is in the bounds already."""
    spectra = [power_law(min(d_out, d_in), exponent, 10.0**scale)] * tokens
    dense = maps(d_out, d_in, spectra, seed=seed, dtype=torch.float64 if double else torch.float32)
    k = min(d_out, d_in, 1 + seed % 3)
    found = route(dense, k, align_to=torch.ones(d_out), joint=joint)
    true = true_values(dense, joint)[..., :k]
    assert ((found.lower <= true) & (true <= found.upper)).all()


@pytest.mark.slow
@pytest.mark.parametrize("design", [[0.0], [0.3, 0.9]], ids=["flat", "falling"])
@pytest.mark.parametrize("joint", [False, True])
def test_norms_and_bounds_hold_at_a_model_s_size(design, joint):
    """576 rows, seven tokens: sums of millions of float32 numbers, whose own error is 3e-4 of them."""
    spectra = [power_law(576, exponent) for exponent in (design * 7)[:7]]
    dense = maps(576, 576, spectra, dtype=torch.float32)
    matrices = (dense.flatten(1)[None] if joint else dense.transpose(0, 1)).double()
    true = torch.linalg.eigvalsh(matrices @ matrices.mT).flip(-1).clamp(min=0).sqrt()
    norm = matrices.square().sum(dim=(1, 2)).sqrt()
    for route in (lapack_svd, block_krylov_svd):
        found = route(dense, 3, align_to=torch.ones(576), joint=joint)
        below, above, S = (part.reshape(-1, 3) for part in (found.lower, found.upper, found.S))
        assert ((below <= true[:, :3]) & (true[:, :3] <= above)).all()
        assert torch.allclose(found.frobenius.double().reshape(-1), norm, rtol=2 * torch.finfo(torch.float32).eps)
        assert ((S - true[:, :3]).abs() <= 1e-3 * true[:, :1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("design", DESIGNS)
def test_values_from_the_gram_matrix_are_within_their_bounds(design, dtype):
    dense = maps(60, 70, DESIGNS[design], dtype=dtype)
    matrix = dense.flatten(1).double()
    found = gram_svd(DenseMaps(dense), matrix @ matrix.T, 4, align_to=torch.ones(60, dtype=dtype))
    true = true_values(dense, True)[:4]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert torch.allclose(found.S.double(), true, rtol=1e-5, atol=1e-6)
    left = (matrix @ found.Vh.double().flatten(1).T - found.U.double() * found.S.double()).norm(dim=0)
    assert (left <= found.residuals + 1e-5 * found.S[0]).all()
