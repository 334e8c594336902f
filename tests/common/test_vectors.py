"""What is multiplied by a map: any tensor or array of the right shape, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loclin
import tiny
from loclin.errors import OptionError


@pytest.fixture(scope="module")
def lin():
    return loclin.linearize(tiny.llama(), tiny.prompt(6))


@pytest.mark.parametrize("points", [("embed", "final"), ("resid_post.0", "mlp_out.1"), ("embed", "embed")])
def test_other_shapes_are_refused_with_the_right_one(lin, points):
    J = lin.jacobian(*points)
    d_out, length, d_in = J.shape
    wrong = [
        (7, d_in),
        (1, d_in),
        (d_in,),
        (length, d_in - 1),
        (length, 1),
        (length, 2 * d_in),
        (),
        (1, 1, length, d_in),
    ]
    for shape in wrong:
        for product in (J.matvec, J.__matmul__):
            with pytest.raises(OptionError, match=rf"T = {length}, d_in = {d_in}"):
                product(torch.ones(shape))
    for shape in [(length, d_in), (2, length + 1, d_in), (2, length, 1)]:
        with pytest.raises(OptionError, match="n, T = "):
            J.matmat(torch.ones(shape))
    for shape in [(1,), (), (d_out + 1,), (3, 1, d_out)]:
        for product in (J.rmatvec, J.T.__matmul__):
            with pytest.raises(OptionError, match=rf"d_out = {d_out}"):
                product(torch.ones(shape))
    for shape in [(d_out,), (3, 1)]:
        with pytest.raises(OptionError, match="n, d_out = "):
            J.rmatmat(torch.ones(shape))
    with pytest.raises(OptionError, match="T = 1, "):
        J.block(2) @ torch.ones(d_in)


def test_complex_sparse_and_other_things_are_refused(lin):
    J = lin.jacobian()
    X = torch.ones(J.shape[1:])
    for given in (
        X + 1j * X,
        X.to_sparse(),
        X.to("meta"),
        "X",
        None,
        J,
        [[1.0], [2.0, 3.0]],
        torch.full_like(X, torch.nan),
    ):
        with pytest.raises(OptionError):
            J @ given


def test_arrays_and_lists_are_vectors_too(lin):
    J = lin.jacobian()
    X, u = torch.randn(2, *J.shape[1:]), torch.randn(3, J.shape[0])
    for as_ in (torch.Tensor.numpy, torch.Tensor.tolist):
        assert torch.equal(J @ as_(X), J.matmat(X))
        assert torch.equal(J @ as_(X[0]), J.matvec(X[0]))
        assert torch.equal(J.T @ as_(u), J.rmatmat(u))
        assert torch.equal(J.T @ as_(u[0]), J.rmatvec(u[0]))
    assert torch.equal(J @ np.ones(J.shape[1:], dtype=int), J @ torch.ones(J.shape[1:]))
    assert J.T.shape == (*J.shape[1:], J.shape[0])


def test_arguments_of_questions_are_checked(lin):
    for ask in (
        lambda: lin.logit_lens(10**6),
        lambda: lin.logit_lens(-1),
        lambda: lin.logit_lens(5, k=-1),
        lambda: lin.next_tokens(-1),
        lambda: lin.validity(swaps=1000),
    ):
        with pytest.raises(OptionError):
            ask()
    for name in ("", " "):
        with pytest.raises(loclin.ModelError, match="not the name of a model"):
            loclin.load(name)
