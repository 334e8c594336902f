"""The matrix-free route: right within its bounds, and honest about columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loclin.errors import OptionError
from loclin.spectral import matrix_free_svd
from spectra import DESIGNS, DenseMaps, maps, power_law, true_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_values_are_certified(design, joint, dtype):
    dense = maps(60, 70, DESIGNS[design], dtype=dtype)
    op = DenseMaps(dense)
    found = matrix_free_svd(op, 3, align_to=torch.ones(60), joint=joint)
    true = true_values(dense, joint)[..., :3]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert found.columns == op.columns
    certain = 1e-3 * found.S[..., :1] < found.S
    assert (found.relative_error[certain] < 1.2e-3).all()


@pytest.mark.parametrize("joint", [False, True])
def test_large_maps_take_fewer_columns_than_the_dense_map(joint):
    dense = maps(400, 300, [power_law(300, 1.0), power_law(300, 1.3)])
    op = DenseMaps(dense)
    found = matrix_free_svd(op, 2, align_to=torch.ones(400), tolerance=1e-2, joint=joint)
    true = true_values(dense, joint)[..., :2]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert op.columns < 300
    assert found.failure > 0
    V = found.Vh if not joint else found.Vh.flatten(1)
    matrices = dense.flatten(1) if joint else dense.transpose(0, 1)
    residuals = (matrices @ V.mT - found.U * found.S.unsqueeze(-2)).norm(dim=-2)
    assert (residuals <= found.residuals).all()


def test_columns_are_kept_within_the_limit_with_honest_bounds():
    dense = maps(200, 200, [power_law(200, 0.3)] * 2)
    op, steps = DenseMaps(dense), []
    found = matrix_free_svd(op, 4, align_to=torch.ones(200), max_columns=100, callback=steps.append)
    true = true_values(dense)[:, :4]
    assert op.columns <= 100
    assert steps == sorted(steps)
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert (found.relative_error > 1e-3).any()


def test_a_seed_repeats():
    op = DenseMaps(maps(50, 40, [power_law(40, 1)]))
    first, second = (matrix_free_svd(op, 2, align_to=torch.ones(50), seed=7) for _ in range(2))
    assert torch.equal(first.U, second.U)


def test_every_value_is_had_exactly():
    dense = maps(12, 9, [power_law(9, 1), power_law(9, 0.2)])
    found = matrix_free_svd(DenseMaps(dense), 9, align_to=torch.ones(12))
    assert found.failure == 0
    assert torch.allclose(found.S, true_values(dense))


def test_impossible_wishes_are_refused():
    op = DenseMaps(torch.eye(6)[:, None])
    for k in (0, 7):
        with pytest.raises(OptionError, match="6 singular values"):
            matrix_free_svd(op, k, align_to=torch.ones(6))
    with pytest.raises(OptionError, match="holds no less than"):
        matrix_free_svd(op, 1, align_to=torch.ones(6), tolerance=1e-9)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    d_out=st.integers(1, 60),
    d_in=st.integers(1, 40),
    tokens=st.integers(1, 3),
    exponent=st.floats(0, 3),
    limit=st.integers(10, 120),
    joint=st.booleans(),
    double=st.booleans(),
)
def test_bounds_are_never_violated(seed, d_out, d_in, tokens, exponent, limit, joint, double):
    """Rounding is in the bounds already; derandomized, as a bound may fail once in a thousand."""
    spectra = [power_law(min(d_out, d_in), exponent, 10.0**i) for i in range(tokens)]
    dense = maps(d_out, d_in, spectra, seed=seed, dtype=torch.float64 if double else torch.float32)
    k = min(d_out, d_in, 1 + seed % 3)
    found = matrix_free_svd(
        DenseMaps(dense), k, align_to=torch.ones(d_out), joint=joint, block=k + 1, max_columns=limit, seed=seed
    )
    true = true_values(dense, joint)[..., :k]
    rounded = 4 * torch.finfo(true.dtype).eps * true[..., :1]  # the reference is a float64 SVD, which rounds too
    assert ((found.lower <= true + rounded) & (true - rounded <= found.upper)).all()
