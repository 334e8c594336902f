"""The inequalities that everything rests on."""

from __future__ import annotations

import pytest
import torch

from loclin.spectral.bounds import chi2_quantile, left_svd, outside, schatten, upper_values
from spectra import maps, power_law


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"), [(0.5, 2, 1.3862943611), (0.001, 8, 0.8571048), (0.95, 1, 3.8414588)]
)
def test_chi_square_quantiles(probability, degrees, quantile):
    assert chi2_quantile(probability, degrees) == pytest.approx(quantile, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [4, 30])
def test_left_svd(rows, dtype):
    B = maps(rows, 20, [power_law(min(rows, 20), 1)], dtype=dtype).transpose(0, 1)
    W, values = left_svd(B)
    assert torch.allclose(values[:, :20], torch.linalg.svdvals(B.double()), atol=1e-7)
    assert torch.allclose(W.mT @ W, torch.eye(rows, dtype=torch.float64))


def test_schatten_norms_close_in_on_the_largest_value():
    E = maps(30, 20, [power_law(20, 0.5)]).transpose(0, 1)
    norms = [norm.item() for norm in schatten(E)]
    assert norms == sorted(norms, reverse=True)
    assert 1 <= norms[-1] <= 1.1
    assert norms[1] == pytest.approx(power_law(20, 0.5).pow(4).sum().item() ** 0.25)


@pytest.mark.parametrize("pushed", [0, 3, 8])
def test_pushed_directions_sharpen_upper_bounds(pushed):
    J = maps(40, 30, [power_law(30, 1)]).transpose(0, 1)
    tangents = torch.linalg.svd(J)[2][:, :pushed].mT + 0.02 * torch.randn(1, 30, pushed, dtype=J.dtype)
    rows = torch.randn(1, 40, 10, dtype=J.dtype)
    Q = torch.linalg.qr(torch.cat([J @ tangents, J @ (J.mT @ rows)], dim=-1)).Q
    B = Q.mT @ J
    Q2 = torch.linalg.qr(torch.cat([Q, J @ B[:, :pushed].mT], dim=-1)).Q
    B = Q2.mT @ J
    W, values = left_svd(B)
    coefficients = torch.eye(B.shape[1], pushed, dtype=J.dtype)[None]
    eta = torch.linalg.matrix_norm(J - Q2 @ B, 2)
    bound = upper_values(values, outside(W, values, coefficients, 1e-12), eta)
    true = torch.linalg.svdvals(J)[:, : bound.shape[1]]
    assert (bound[:, : true.shape[1]] >= true - 1e-12).all()
    assert (values[:, : true.shape[1]] <= true + 1e-12).all()
