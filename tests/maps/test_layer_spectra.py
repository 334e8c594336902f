"""Every layer's maps from one sweep equal those made one by one, and their spectra LAPACK's."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import tiny
from loclin.errors import OptionError
from loclin.linearization import linearize
from loclin.maps.layer_maps import COMPONENTS, check_components, layer_maps, plan_direction
from loclin.maps.layer_spectra import LayerSpectra
from loclin.maps.linear_map import LinearMap
from loclin.models import tiny as families
from loclin.network.anatomy import EXPLICIT
from loclin.network.chain import Chain
from loclin.network.explicit_attention import ExplicitAttention
from loclin.network.points import Point
from loclin.network.prefix import prefix_maps
from loclin.spectral import ritz_svd, stable_rank
from spectra import maps as random_maps
from spectra import power_law

FAMILIES = ["llama", "gemma3_text", "phi3", "olmo2", "qwen2", "gpt2", "gptj", "gpt_neox", "qwen2_moe"]


@cache
def built(name, gate="activation", dtype=torch.float64):
    precision = "double" if dtype == torch.float64 else "single"
    return linearize(families.build(name, dtype=dtype), tiny.prompt(6), gate=gate, precision=precision)


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


def one_by_one(lin, source, target, position, normed=False):
    """The map by generic links, `[T, d_out, d_in]`."""
    return LinearMap(Chain(lin.trace, explicit=False), source, target, position, normed=normed).dense().transpose(0, 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize(
    ("family", "explicit"), [(name, kind) for name in FAMILIES for kind in (True, False) if kind <= (name in EXPLICIT)]
)
def test_one_forward_sweep_gives_every_prefix_map(family, explicit, position):
    lin = built(family)
    at = lin.trace.position(position)
    seen = 0
    for layer, maps in prefix_maps(Chain(lin.trace, explicit=explicit), at, range(6), COMPONENTS):
        for name, found in maps.items():
            assert far(found.mT, one_by_one(lin, Point("embed"), Point(name, layer), at)) < 1e-13
            seen += 1
    assert seen == 3 * lin.trace.n_layers


@pytest.mark.sampled(3)
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_heads_mixed_in_the_output_matrix(monkeypatch, family, folds):
    lin = built(family)
    taken = []
    monkeypatch.setattr(ExplicitAttention, "folding_pays", lambda *_: taken.append(folds) or folds)
    for layer, maps in prefix_maps(lin.chain, 4, range(1, 6), COMPONENTS):
        for name, found in maps.items():
            exact = one_by_one(lin, Point("embed"), Point(name, layer), 4)[1:]
            assert far(found.mT, exact) < 1e-13
    assert len(taken) == lin.trace.n_layers


def test_attention_that_looks_ahead():
    lin = linearize(tiny.gemma3(bidirectional=True), tiny.prompt(7), precision="double")
    for layer, maps in prefix_maps(lin.chain, 2, range(7), COMPONENTS):
        for name, found in maps.items():
            assert far(found.mT, one_by_one(lin, Point("embed"), Point(name, layer), 2)) < 1e-13
    assert found[5].abs().max() > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["cumulative", "layerwise", "suffix"])
@pytest.mark.parametrize(
    ("family", "gate"), [*((name, "activation") for name in FAMILIES), ("qwen2", "up"), ("qwen2", "half")]
)
def test_every_map_and_its_bias(family, mode, gate):
    lin = built(family, gate)
    points = {
        "cumulative": lambda name, layer: (Point("embed"), Point(name, layer)),
        "layerwise": lambda name, layer: (Point("resid_pre", layer), Point(name, layer)),
        "suffix": lambda name, layer: (Point(name, layer), Point("final")),
    }[mode]
    normed, seen = mode != "suffix", set()
    for item in layer_maps(lin.chain, mode, 5, COMPONENTS, normed=normed):
        J = LinearMap(lin.chain, *points(item.component, item.layer), 5, normed=normed)
        assert far(item.maps, one_by_one(lin, J.source, J.target, 5, normed)) < 1e-12
        assert torch.equal(item.joint, item.maps.transpose(0, 1).flatten(1))
        assert far(item.value, J.value) < 1e-12
        assert (item.bias - J.bias).norm() < 1e-11 * J.value.norm()
        assert item.reconstruction_error < 1e-12
        seen.add((item.component, item.layer))
    assert len(seen) == 3 * lin.trace.n_layers


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_backward_sweeps_give_the_same(family):
    lin = built(family)
    forward, backward = (lin.layer_spectra(k=3, direction=direction) for direction in ("forward", "backward"))
    assert torch.allclose(forward.S, backward.S, rtol=1e-9)
    assert torch.allclose(forward.frobenius, backward.frobenius, rtol=1e-12)
    assert (forward.direction, backward.direction) == ("forward", "backward")


def test_maps_add_up_along_the_residual_stream():
    lin = built("gemma3_text")
    before = torch.eye(lin.trace.width, dtype=torch.float64) * (torch.arange(6) == 5)[:, None, None]
    for _, maps in prefix_maps(lin.chain, 5, range(6), COMPONENTS):
        after = maps["resid_post"].mT
        assert far(before + maps["attn_out"].mT + maps["mlp_out"].mT, after) < 1e-14
        before = after.clone()


def test_the_product_of_layers_is_the_cumulative_map():
    lin = built("llama")
    T, d = 6, lin.trace.width
    product = torch.eye(T * d, dtype=torch.float64)
    for layer, _ in enumerate(lin.trace.layers):
        whole = torch.cat(
            [
                one_by_one(lin, Point("resid_pre", layer), Point("resid_post", layer), t).transpose(0, 1).flatten(1)
                for t in range(T)
            ]
        )
        product = whole @ product
    *_, (_, last) = prefix_maps(lin.chain, T - 1, range(T))
    assert far(last["resid_post"].mT.transpose(0, 1).flatten(1), product[-d:]) < 1e-13


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["cumulative", "layerwise", "suffix"])
def test_spectra_are_those_of_the_maps(mode):
    lin = built("qwen2")
    found = lin.layer_spectra(mode=mode, k=4)
    normed = mode != "suffix"
    for item in layer_maps(lin.chain, mode, 5, COMPONENTS, normed=normed):
        at = (found.index(item.component), item.layer)
        exact = torch.linalg.svdvals(item.maps)
        assert torch.allclose(found.S[at], exact[:, :4], rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.joint_S[at], torch.linalg.svdvals(item.joint)[:4], rtol=1e-9)
        ranks = exact.square().sum(1) / exact[:, 0].square()
        assert torch.allclose(found.stable_rank[at], ranks.nan_to_num(), rtol=1e-9)
        rebuilt = torch.einsum("tok,tk,tki->toi", found.U[at], found.S[at], found.Vh[at])
        best = exact[:, 4:].square().sum(1).sqrt()
        assert torch.allclose((item.maps - rebuilt).flatten(1).norm(dim=1), best, rtol=1e-6, atol=1e-11)
    assert found.reconstruction_error.max() < 1e-12


def test_wide_maps_go_by_krylov():
    lin = linearize(tiny.llama(), tiny.prompt())
    wide = torch.randn(2, 120, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = wide @ torch.diag(0.9 ** torch.arange(150.0, dtype=torch.float64))
    every = ritz_svd(wide, 3, wide[0, :, 0], tolerance=1e-4)
    for i, matrix in enumerate(wide):
        U, S, Vh, residuals = (part[i] for part in (every.U, every.S, every.Vh, every.residuals))
        exact = torch.linalg.svdvals(matrix)
        assert (exact[:3] * (1 + 1e-12) >= S).all()
        assert ((exact[:3] - S) / exact[:3]).max() < 1e-3
        assert torch.allclose((matrix @ Vh.T - U * S).norm(dim=0), residuals, atol=1e-9)
        assert far(matrix.T @ U, Vh.T * S) < 1e-12
        assert (wide[0, :, 0] @ U >= 0).all()
        assert every.frobenius[i] == pytest.approx(matrix.norm().item())
    assert lin.layer_spectra(k=1).S.shape == (3, 3, 7, 1)


def test_maps_of_one_batch_are_done_when_they_are_done():
    """A zero map, one of low rank and one that decays slowly stand beside easy ones; each gets its own triples."""
    random = torch.Generator().manual_seed(1)
    easy, slow = (
        torch.randn(120, 150, generator=random, dtype=torch.float64)
        @ torch.diag(rate ** torch.arange(150.0, dtype=torch.float64))
        for rate in (0.8, 0.999)
    )
    low = torch.randn(120, 2, generator=random, dtype=torch.float64) @ torch.randn(
        2, 150, generator=random, dtype=torch.float64
    )
    batch = torch.stack([easy, torch.zeros_like(easy), slow, low, 2 * easy])
    found = ritz_svd(batch, 4, easy[:, 0], tolerance=1e-6)
    exact = torch.linalg.svdvals(batch)[:, :4]
    assert torch.allclose(found.S, exact, rtol=1e-5, atol=1e-9)
    rebuilt = torch.einsum("mok,mk,mki->moi", found.U, found.S, found.Vh)
    missed = torch.linalg.svdvals(batch)[:, 4:].square().sum(1).sqrt()
    assert torch.allclose((batch - rebuilt).flatten(1).norm(dim=1), missed, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("gap", [0.0, 0.02, 0.5])
def test_stable_ranks_are_right_to_1e_5_at_a_model_s_size(gap, k):
    """In float32, of 576 x 4032 numbers: the norm is summed in float64, and the largest value found more exactly."""
    spectrum = power_law(576, 0.5)
    spectrum[0] *= 1 + gap
    spectrum[1] = 1.0
    (matrix,) = random_maps(576, 4032, [spectrum], dtype=torch.float32).unbind(1)
    found = ritz_svd(matrix[None], k, matrix[:, 0], tolerance=1e-3)
    exact = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T)
    rank = (exact.sum() / exact[-1]).item()
    assert found.frobenius.item() == pytest.approx(exact.sum().sqrt().item(), rel=1e-6)
    assert found.S[0, 0].item() == pytest.approx(exact[-1].sqrt().item(), rel=5e-6)
    assert stable_rank(found.frobenius, found.S[:, 0]).item() == pytest.approx(rank, rel=1e-5)


def test_float32():
    found = built("llama", dtype=torch.float32).layer_spectra(k=2)
    assert found.reconstruction_error.max() < tiny.rounding()


def test_tokens_behind_the_position_have_zero_maps():
    found = built("llama").layer_spectra(k=2, position=2)
    assert found.S[:, :, 3:].abs().max() == 0
    assert found.stable_rank[:, :, 3:].abs().max() == 0
    assert found.S[:, :, :3, 0].min() > 0


def test_saved_and_loaded(tmp_path):
    found = built("llama").layer_spectra(k=2)
    found.save(tmp_path / "layers.safetensors")
    again = LayerSpectra.load(tmp_path / "layers.safetensors")
    assert torch.equal(again.S, found.S)
    assert again.provenance.key() == found.provenance.key()
    assert again.components == ["attn_out", "mlp_out", "resid_post"]
    table = again.to_dataframe()
    assert len(table) == found.frobenius.numel()
    assert table["stable_rank"].iloc[-1] == found.stable_rank[-1, -1, -1].item()


def test_one_layer_as_an_svd():
    found = built("llama").layer_spectra(k=3)
    svd = found.svd("mlp_out", -1)
    assert svd.S.shape == (6, 3)
    assert (svd.lower <= svd.S).all()
    assert (svd.upper >= svd.S).all()
    with pytest.raises(OptionError, match="layer 9: choose a layer from 0 to 2"):
        found.svd("mlp_out", 9)
    with pytest.raises(OptionError, match="mlp_out"):
        built("llama").layer_spectra(components=["resid_post"], k=1).svd("mlp_out", 0)


def test_the_route_follows_cost_and_memory():
    lin = built("llama")
    assert plan_direction(lin.chain, 5, COMPONENTS) == "forward"
    assert plan_direction(lin.chain, 5, COMPONENTS, 10_000) == "backward"


def test_mistakes():
    lin = built("llama")
    with pytest.raises(OptionError, match="choose some of attn_out, mlp_out, resid_post"):
        lin.layer_spectra(components=["resid_pre"])
    with pytest.raises(OptionError, match="choose one of cumulative, layerwise, suffix"):
        lin.layer_spectra(mode="all")
    with pytest.raises(OptionError, match="choose one of forward, backward"):
        lin.layer_spectra(direction="sideways")
    with pytest.raises(OptionError, match="k is 1 to"):
        lin.layer_spectra(k=1000)
    with pytest.raises(OptionError, match="leave it out"):
        lin.layer_spectra(mode="suffix", normed=True)


def test_layers_without_parts_show_the_stream_alone():
    model = tiny.llama()
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: 2 * output)
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: 1.5 * output)
    lin = linearize(model, tiny.prompt(), precision="double")
    assert check_components(lin.chain, None) == ("resid_post",)
    assert lin.layer_spectra(k=1).reconstruction_error.max() < 1e-12
    with pytest.raises(OptionError, match="layer 1 "):
        lin.layer_spectra(components=["mlp_out"])
