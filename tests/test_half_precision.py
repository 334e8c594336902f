"""Models in float16 and bfloat16: exact maps, whatever they keep in float32, and spectra of maps in half precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import loclin
import tiny
from loclin.common.sums import relative_error
from loclin.errors import OptionError
from loclin.freeze import FreezeOptions, frozen
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.models import wrap

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_a_residual_stream_in_float32_is_not_taken_for_a_model_in_float32(family, dtype):
    hf = families.build(family, dtype=dtype, seed=3)
    lin = linearize(wrap(hf), families.prompt(hf, 5, 3))
    certificate = lin.certify()
    assert lin.trace.stock_final.dtype == torch.float32
    assert lin.precision == lin.jacobian().provenance().precision == "single"
    assert certificate.passed
    assert certificate.bit_identical
    assert certificate.reconstruction_error < tiny.rounding()
    assert certificate.forward_error > 1e-5
    assert linearize(wrap(hf), lin.input_ids, precision="stock").certify().passed
    wide = linearize(wrap(copy.deepcopy(hf).float()), lin.input_ids).jacobian().dense()
    assert relative_error(lin.jacobian().dense() - wide, wide) < 0.2  # the coefficients are those of the rounded model


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_casts_do_not_round_the_linear_path(dtype, ordinary):
    class Cast(nn.Module):
        def forward(self, x):
            return x.to(dtype).to(x)

    x, module = torch.randn(1, 3, 5), Cast()
    with frozen(module, FreezeOptions(ordinary=ordinary), torch.float32) as mode:
        mode.enter(x)
        assert torch.equal(mode.live(module(x)), x)


@pytest.fixture(scope="module", params=HALF, ids=str)
def half(request):
    return linearize(tiny.llama(dtype=request.param), tiny.prompt(4), precision="stock")


def exact_values(J, joint=False):
    dense = J.dense().double()
    return torch.linalg.svdvals(dense.flatten(1)[None] if joint else dense.transpose(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", ["auto", "lapack", "block_krylov"])
def test_spectra_of_a_map_in_half_precision_are_taken_in_float32(half, method, joint):
    J = half.jacobian()
    found = J.svd(3, joint=joint, method=method, tolerance=1e-5)
    S = found.S[None] if joint else found.S
    assert J.dense().dtype.itemsize == 2
    assert S.dtype == torch.float32
    assert (S / exact_values(J, joint)[:, :3] - 1).abs().max() < 1e-4
    if not joint:
        assert found.subspace_angles(found, 0)


def test_ranks_and_norms_of_a_map_in_half_precision(half):
    J = half.jacobian()
    values = exact_values(J)
    norm = values.square().sum(1).sqrt()
    norms = J.norms()
    for mine, right in (
        (J.singular_values(), values),
        (norms.largest, values[:, 0]),
        (norms.frobenius, norm),
        (J.frobenius_norm(), norm),
        (J.stable_rank(), (norm / values[:, 0]) ** 2),
    ):
        assert relative_error(mine - right, right) < 1e-4
    layers = half.layer_spectra(k=2)
    assert layers.S.dtype == torch.float32
    assert layers.S.isfinite().all()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("tolerance", [1e-3, 0.9])
def test_products_in_half_precision_are_too_coarse_for_a_spectrum(half, joint, tolerance):
    with pytest.raises(OptionError, match="precision='single'"):
        half.jacobian().svd(2, joint=joint, method="matrix_free", tolerance=tolerance)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lapack", "block_krylov", "layers"])
def test_bounds_hold_what_half_precision_rounds(half, method):
    exact = exact_values(linearize(half.model, half.input_ids, precision="double").jacobian(target="resid_post.1"))
    if method == "layers":
        found = half.layer_spectra(components=["resid_post"], k=3, normed=False).svd("resid_post", 1)
    else:
        found = half.jacobian(target="resid_post.1").svd(3, method=method)
    assert (found.lower <= exact[:, :3]).all()
    assert (exact[:, :3] <= found.upper).all()


@pytest.mark.sampled(1)
def test_everything_is_there_in_half_precision(half):
    J, explained = half.jacobian(), loclin.explain(half)
    assert explained.certificate.passed
    assert loclin.validity(half, draws=2).to_json()
    assert loclin.steering.output_basis(half, "resid_post.0", k=3).direction.isfinite().all()
    operator = loclin.steering.Operator.make(half, 1, rank=2, signs="fixed")
    with operator.apply(half.model, 1.0):
        assert half.model.hf(half.input_ids).logits.isfinite().all()
    product = J.to_scipy() @ np.ones(J.shape[1] * J.shape[2], dtype=np.float32)
    expected = J.dense().double().sum((1, 2)).numpy()
    size = J.dense().double().abs().sum((1, 2)).numpy()
    assert product.dtype == np.float32
    assert (abs(product - expected) < 0.1 * size).all()
