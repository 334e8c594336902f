"""Sums of squares are those of float64, whatever the size, the layout and the axes, and cost no copy of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loclin.common.sums import norms, relative_error, square_sums


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {item.untyped_storage().data_ptr() for item in args if isinstance(item, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("permuted", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_sums_of_squares_are_float64_s(dtype, axis, permuted):
    x = torch.randn(60, 5, 800, generator=torch.Generator().manual_seed(0)).to(dtype).permute(permuted)
    before = x.clone()
    expected = x.double().square().flatten(axis).sum(-1)
    assert torch.allclose(square_sums(x, axis), expected, rtol=1e-12)
    assert torch.allclose(norms(x, axis), expected.sqrt(), rtol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(576, 4032), (640, 5120), (3_000_000,)])
def test_a_norm_of_millions_of_float32_numbers_is_right(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert norms(x).item() == pytest.approx(x.double().square().sum().sqrt().item(), rel=1e-12)


def test_sums_of_nothing_and_of_the_extreme():
    assert square_sums(torch.zeros(0, 3)).item() == 0
    assert square_sums(torch.zeros(4, 0, 3), 1).tolist() == [0.0] * 4
    assert norms(torch.full((4,), 1e30)).item() == pytest.approx(2e30)
    assert norms(torch.full((4,), 1e-30)).item() == pytest.approx(2e-30)
    assert torch.isnan(norms(torch.tensor([1.0, float("nan")])))


def test_relative_errors():
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x / 10, x) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_no_copy_of_the_whole_is_made():
    x = torch.randn(600, 1000)
    with Largest() as seen:
        norms(x)
        norms(x.reshape(6, 100, 1000), 1)
    assert 0 < seen.nbytes <= x.nbytes / 8
