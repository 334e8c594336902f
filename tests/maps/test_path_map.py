"""One component's map, and paths as products of maps, against autograd on the rewritten model and their own sum."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import shares_oracle
import tiny
from loclin.errors import OptionError, PromptError
from loclin.linearization import Linearization, linearize
from loclin.maps.path_map import component_map, path_map
from loclin.models import tiny as families
from loclin.network.components import parse_component
from loclin.network.points import Point, parse_point

BUILDS = {"llama": tiny.llama, "llama-biases": partial(tiny.llama, biases=True), "gemma3": tiny.gemma3}
SIZE = 6


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


def part(lin: Linearization, name: str, position: int = -1):
    return component_map(lin.chain, parse_component(name, lin.trace), lin.trace.position(position), None)


def path(lin: Linearization, *names: str, target: str = "final", position: int = -1):
    parts = [parse_component(name, lin.trace) for name in names]
    return path_map(lin.chain, parts, parse_point(target, lin.trace.n_layers), lin.trace.position(position), None)


@pytest.fixture(scope="module", params=BUILDS.values(), ids=BUILDS)
def lin(request):
    return linearize(request.param(), tiny.prompt(SIZE), precision="double")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("position", [-1, 2])
def test_heads_sum_to_the_attention(lin, position):
    whole = lin.jacobian("resid_pre.1", "attn_out.1", position=position)
    heads = [part(lin, f"L1H{head}", position) for head in range(4)]
    assert far(sum(J.dense() for J in heads), whole.dense()) < 1e-12
    behind = whole.bias_by_source().get("model.layers.1.self_attn.o_proj.bias", torch.zeros_like(whole.bias))
    assert far(sum(J.bias for J in heads) + behind + 1, whole.bias + 1) < 1e-12
    assert far(sum(J.value for J in heads) + behind, whole.value) < 1e-12
    for J in heads:
        assert far(J.reconstruct(), J.value) < 1e-12
        assert far(J.bias + 1, sum(J.bias_by_source().values(), start=torch.ones_like(J.bias))) < 1e-12
        assert torch.linalg.matrix_rank(J.dense()[:, 0], rtol=1e-9) <= 8  # d_head at most
    assert far(part(lin, "L-2H-1", position).dense(), heads[-1].dense()) == 0


@pytest.mark.parametrize(("name", "source"), [("attn_out.1", "resid_pre.1"), ("mlp_out.1", "resid_mid.1")])
def test_whole_parts_are_the_maps_between_their_points(lin, name, source):
    J, whole = part(lin, name), lin.jacobian(source, name)
    assert (str(J.source), str(J.target)) == (source, name)
    assert far(J.dense(), whole.dense()) < 1e-13
    assert far(J.value, whole.value) < 1e-13
    X = torch.randn(3, *J.shape[1:], dtype=J.dtype)
    assert far(J.matmat(X), torch.einsum("oti,nti->no", J.dense(), X)) < 1e-13


@pytest.mark.parametrize("biases", [False, True])
def test_heads_and_their_product_are_those_of_brute_force(biases):
    """Maps at all positions, row by row, by autograd through the rewritten Llama."""
    ids = tiny.prompt(SIZE)
    lin = linearize(tiny.llama(biases=biases), ids, precision="double")
    network = shares_oracle.Network(tiny.llama(biases=biases, attn="eager"), ids)
    dense = {}
    for layer, head in ((0, 1), (2, 3)):
        weight = network.model.model.layers[layer].self_attn.o_proj.weight.detach().unflatten(1, (4, -1))[:, head]
        written = network.z[layer].unflatten(-1, (4, -1))[0, :, head] @ weight.T
        rows = [torch.autograd.grad(row, network.pre[layer], retain_graph=True)[0][0] for row in written.flatten()]
        dense[layer] = torch.stack(rows).view(SIZE, 24, SIZE, 24)
        assert far(part(lin, f"L{layer}H{head}").dense(), dense[layer][-1]) < 1e-12
    product = torch.einsum("oti,tisj->osj", dense[2][-1], dense[0])
    norm = network.model.model.norm
    stream = network.stream[0][0, -1].detach()
    scale = torch.rsqrt(stream.square().mean() + norm.variance_epsilon) * norm.weight.detach()
    J = path(lin, "L0H1", "L2H3")
    assert far(J.dense(), product * scale[:, None, None]) < 1e-12
    assert far(J.block(2).dense()[:, 0], (product * scale[:, None, None])[:, 2]) < 1e-12
    logits = path(lin, "L0H1", "L2H3", target="logits").dense()
    assert far(logits, torch.einsum("vo,oti->vti", network.model.lm_head.weight.detach(), J.dense())) < 1e-12


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_all_paths_sum_to_the_network(family):
    """Every choice of parts of two layers, from none to all; with their biases they give the stream."""
    model = families.build(family)
    lin = linearize(model, families.prompt(model, SIZE), precision="double")
    both = () if family == "phi" else (("attn_out", "mlp_out"),)  # beside one another, neither reads the other
    choices = ((), ("attn_out",), ("mlp_out",), *both)
    found = lin.embeddings[-1]
    for chosen in itertools.product(choices, repeat=2):
        names = [f"{kind}.{layer}" for layer, kinds in enumerate(chosen) for kind in kinds]
        if names:
            found = found + path(lin, *names, target="resid_post.1").value
    assert far(found, lin.value("resid_post.1")[-1]) < 1e-12


def test_positions_of_a_path_sum_to_it(lin):
    whole = path(lin, "L0H1", "L2H3")
    at = [path(lin, f"L0H1@{position}", "L2H3") for position in range(SIZE)]
    assert far(sum(J.dense() for J in at), whole.dense()) < 1e-12
    assert far(sum(J.matvec(J.input) for J in at), whole.matvec(whole.input)) < 1e-12


def test_a_path_is_a_linear_map(lin):
    J = path(lin, "L0H1", "mlp_out.1", "L2H3")
    u = torch.randn(J.shape[0], dtype=J.dtype)
    X = torch.randn(*J.shape[1:], dtype=J.dtype)
    assert (u @ J.matvec(X)).item() == pytest.approx((J.rmatvec(u) * X).sum().item(), rel=1e-11)
    found = J.svd(2)
    assert found.provenance.target == "final by L0H1 > mlp_out.1 > L2H3"
    assert far(found.S, torch.linalg.svdvals(J.dense().transpose(0, 1))[:, :2]) < 1e-6
    assert "L0H1 > mlp_out.1 > L2H3" in repr(J)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a path has no component"),
        (["H3"], "no component 'H3': write L3H5"),
        (["L1H2@x"], "no component 'L1H2@x'"),
        (["resid_post.1"], "no component 'resid_post.1'"),
        (["L3H0"], "the model has layers 0 to 2"),
        (["L1H4"], "L1H4: layer 1 has query heads 0 to 3"),
        (["L2H0", "L1H0"], "L1H0 does not read what L2H0 writes: a path goes up"),
        (["L1H0", "L1H1"], "a path goes up"),
        (["mlp_out.1", "attn_out.1"], "a path goes up"),
    ],
)
def test_parts_that_are_none(lin, names, message):
    with pytest.raises(OptionError, match=message):
        path(lin, *names)


def test_positions_outside_the_prompt(lin):
    with pytest.raises(PromptError, match="position 6 is outside the prompt"):
        path(lin, "L0H1@6")


def test_blocks_side_by_side_are_no_path():
    model = families.build("gptj")
    lin = linearize(model, families.prompt(model), precision="double")
    with pytest.raises(OptionError, match="mlp_out.1 does not read what attn_out.1 writes"):
        path(lin, "attn_out.1", "mlp_out.1")
    assert part(lin, "mlp_out.1").source == Point("resid_pre", 1)


def test_layers_without_heads_are_named():
    model = families.build("jamba")
    lin = linearize(model, families.prompt(model), precision="double")
    with pytest.raises(OptionError, match="layer 0: mamba .JambaMambaMixer. has no attention heads"):
        part(lin, "L0H0")
