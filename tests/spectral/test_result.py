"""Results say what is not defined."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from loclin.linearization import linearize
from loclin.spectral import SVD, lapack_svd
from spectra import maps


def result(values, error=0.0):
    S = torch.tensor([values])
    k = S.shape[1]
    zero = torch.zeros_like(S)
    return SVD(torch.eye(k)[None], S, torch.eye(k)[None], zero, S - error, S + error, 0.0, S.norm(dim=1), "lapack")


def test_near_equal_values_are_one_block():
    found = result([5.0, 4.999, 4.998, 2.0, 1.0, 1.0])
    assert found.blocks(0) == [[0, 1, 2], [3], [4, 5]]
    assert found.blocks(0, tolerance=0.0) == [[0], [1], [2], [3], [4, 5]]


def test_values_that_the_bounds_do_not_part_are_one_block():
    assert result([5.0, 4.0, 2.0], error=0.6).blocks(0) == [[0, 1], [2]]


def test_relative_error():
    assert result([4.0, 2.0], error=0.1).relative_error[0].tolist() == pytest.approx([0.025, 0.05], rel=1e-5)
    assert result([0.0]).relative_error.tolist() == [[0.0]]


@pytest.mark.parametrize("angle", [1e-10, 1e-3, 1.0, math.pi / 2])
def test_angles(angle):
    one = torch.eye(3, dtype=torch.float64)[None]
    c, s = math.cos(angle), math.sin(angle)
    turned = torch.tensor([[[c, 0, -s], [0, 1, 0], [s, 0, c]]], dtype=torch.float64)
    values = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    parts = (values, one, values * 0, values, values, 0.0, values.norm(dim=1), "lapack")
    angles = SVD(one, *parts).subspace_angles(SVD(turned, *parts), token=0)
    assert [a.item() for a in angles] == pytest.approx([angle, 0.0, angle], rel=1e-6, abs=1e-15)


def test_angles_of_a_block_do_not_see_its_rotation():
    dense = maps(9, 9, [torch.tensor([2.0, 2.0, 1.0])])
    first = lapack_svd(dense, 2, align_to=torch.ones(9))
    second = lapack_svd(dense + 1e-13 * torch.randn(dense.shape, dtype=dense.dtype), 2, align_to=torch.ones(9))
    (angles,) = first.subspace_angles(second, token=0)
    assert (angles < 1e-11).all()


def test_gains_are_products_with_each_token_s_input():
    lin = linearize(tiny.llama(), tiny.prompt(4))
    J, x = lin.jacobian(), lin.embeddings
    own, joint = J.svd(3), J.svd(4, joint=True)  # as many as tokens: the axes could be taken for one another
    for t in range(4):
        for j in range(3):
            assert torch.allclose(own.gains(x)[t, j], own.Vh[t, j] @ x[t])
            assert torch.allclose(joint.gains(x)[t, j], joint.Vh[j, t] @ x[t])
