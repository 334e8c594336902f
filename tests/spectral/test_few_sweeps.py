"""Seven products: right within their bounds, and no more of them."""

from __future__ import annotations

import pytest
import torch

from loclin.spectral import few_sweeps
from loclin.spectral.few_sweeps import SWEEPS, few_sweeps_svd, wide_columns
from spectra import DESIGNS, DenseMaps, maps, power_law, true_values


class Counted(DenseMaps):
    """Maps that count their products."""

    products = 0

    def matmat(self, Xs):
        self.products += 1
        return super().matmat(Xs)

    def rmatmat(self, Us):
        self.products += 1
        return super().rmatmat(Us)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("size", [60, 300])
def test_values_are_within_their_bounds(design, dtype, size):
    dense = maps(size, 70, DESIGNS[design], dtype=dtype)
    op = Counted(dense)
    found = few_sweeps_svd(op, 1, align_to=torch.ones(size))
    true = true_values(dense, True)[..., :1]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert found.columns == op.columns <= wide_columns(1, size)
    assert op.products <= SWEEPS


@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_large_map_takes_seven_products_and_its_bounds_hold(decay, seed):
    dense = maps(700, 250, [power_law(250, decay)] * 3)
    op = Counted(dense)
    found = few_sweeps_svd(op, 4, align_to=torch.ones(700), seed=seed)
    true = true_values(dense, True)[..., :4]
    assert ((found.lower <= true) & (true <= found.upper)).all()
    assert op.products == SWEEPS
    assert found.columns == op.columns == wide_columns(4, 700)
    assert 0 < found.failure < 0.01
    wide = dense.flatten(1)
    residuals = (wide @ found.Vh.flatten(1).mT - found.U * found.S.unsqueeze(-2)).norm(dim=-2)
    assert (residuals <= found.residuals).all()
    if decay > 0.5:
        assert (found.relative_error < 2e-3).all()


def test_what_the_basis_misses_is_not_overlooked(monkeypatch):
    monkeypatch.setattr(few_sweeps, "_WIDER", 1)  # too narrow for a spectrum that hardly decays
    dense = maps(700, 250, [power_law(250, 0.05)] * 3)
    found = few_sweeps_svd(DenseMaps(dense), 8, align_to=torch.ones(700))
    true = true_values(dense, True)[..., :8]
    assert (true <= found.upper).all()
    assert (found.relative_error > 1e-2).any()
