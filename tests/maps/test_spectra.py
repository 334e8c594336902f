"""The spectra of a map: every method gives the same answer, and the plan says which one is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.maps import linear_map
from loclin.maps.linear_map import LinearMap


@pytest.fixture(scope="module")
def lin():
    return linearize(tiny.gemma3(), tiny.prompt(5), precision="double")


@pytest.fixture
def J(lin):
    """A map that has not been made dense."""
    known = lin.jacobian()
    return LinearMap(lin.chain, known.source, known.target, known.position)


def matrices(lin, joint):
    dense = lin.jacobian().dense()
    return dense.flatten(1)[None] if joint else dense.transpose(0, 1)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", ["auto", "lapack", "block_krylov", "matrix_free"])
def test_every_method_gives_the_same_triples(lin, J, method, joint):
    found = J.svd(3, joint=joint, method=method, tolerance=1e-6)
    U, S, Vh = (part[None] if joint else part for part in (found.U, found.S, found.Vh))
    for matrix, u, s, v, low, high in zip(
        matrices(lin, joint), U, S, Vh.flatten(2) if joint else Vh, *bounds(found, joint), strict=True
    ):
        true = torch.linalg.svdvals(matrix)[:3]
        assert s.tolist() == pytest.approx(true.tolist(), rel=1e-6)
        assert ((low <= true * (1 + 1e-12)) & (true <= high * (1 + 1e-12))).all()
        assert torch.allclose(matrix @ v.T, u * s, atol=1e-3 * s[0].item())
        assert (J.value @ u >= 0).all()
    assert found.provenance.target == "final"
    assert (J.cached_dense is None) == (found.method == "matrix_free")


def bounds(found, joint):
    return (part[None] if joint else part for part in (found.lower, found.upper))


def test_a_seed_gives_the_same_result_again(J):
    one, same, other = (J.svd(2, method="matrix_free", seed=seed).U for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_dense_map_takes_over_where_products_alone_do_not_reach(monkeypatch, J):
    plan = linear_map.make_plan
    few = {"chosen": "matrix_free", "max_columns": 8}
    monkeypatch.setattr(linear_map, "make_plan", lambda *args, **kwargs: replace(plan(*args, **kwargs), **few))
    found = J.svd(8, tolerance=1e-9)
    assert found.method == "block_krylov"
    assert (found.relative_error < 1e-8).all()


def test_norms_and_ranks(lin, J):
    true = torch.stack([torch.linalg.svdvals(matrix) for matrix in matrices(lin, False)])
    rank = true.square().sum(-1) / true[:, 0].square()
    assert J.norms(0.02).stable_rank.tolist() == pytest.approx(rank.tolist(), rel=0.05)
    assert J.cached_dense is None or J.norms(0.02).failure == 0
    assert J.stable_rank().tolist() == pytest.approx(rank.tolist())
    assert J.stable_rank(tolerance=0.02).tolist() == pytest.approx(rank.tolist())
    assert J.frobenius_norm(tolerance=0.02).tolist() == pytest.approx(true.square().sum(-1).sqrt().tolist())
    entropy = -(true / true.sum(-1, keepdim=True)).xlogy(true / true.sum(-1, keepdim=True)).sum(-1)
    assert J.effective_rank().tolist() == pytest.approx(entropy.exp().tolist())


def test_zero_maps(lin):
    J = lin.jacobian(position=2)
    for method in ("lapack", "block_krylov", "matrix_free"):
        found = LinearMap(lin.chain, J.source, J.target, 2).svd(2, method=method)
        assert (found.S[3:] == 0).all()
        assert (found.S[:3] > 0).all()
        assert found.S.isfinite().all()
    assert (J.stable_rank()[3:] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "24 singular values"),
        ({"k": 25}, "24 singular values"),
        ({"tolerance": 1e-20}, "holds no less than"),
        ({"tolerance": 1.0}, "tolerance=1: give a fraction of each value between 0 and 1"),
        ({"tolerance": 2.0}, "tolerance=2: give a fraction of each value between 0 and 1"),
        ({"method": "fast"}, "choose one of auto, lapack, block_krylov, matrix_free"),
    ],
)
def test_what_cannot_be_asked_is_refused(J, arguments, message):
    with pytest.raises(OptionError, match=message):
        J.svd(**arguments)


@pytest.mark.parametrize("ask", ["norms", "frobenius_norm", "stable_rank"])
@pytest.mark.parametrize("tolerance", [0.0, 2.0, float("nan")])
def test_norms_have_a_tolerance_that_is_a_fraction(J, ask, tolerance):
    with pytest.raises(OptionError, match="tolerance="):
        getattr(J, ask)(tolerance)


def test_scipy_agrees(J):
    svds = pytest.importorskip("scipy.sparse.linalg").svds
    found = J.svd(4, joint=True)
    values = np.sort(svds(J.to_scipy(), k=4, return_singular_vectors=False))[::-1]
    assert (found.lower.numpy() <= values * (1 + 1e-9)).all()
    assert (values <= found.upper.numpy() * (1 + 1e-9)).all()
