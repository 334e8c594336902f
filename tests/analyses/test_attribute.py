"""Shares sum to the target at every level, and are what brute force says they are."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import shares_oracle
import tiny
from least import within
from loclin.analyses.attribution.result import KINDS, Attribution
from loclin.analyses.attribution.target import Margin
from loclin.analyses.explain import explain
from loclin.errors import OptionError
from loclin.freeze import frozen
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.network.autograd import batched_jvp
from loclin.network.ends import OutputHeadLink

LEVELS = ("token", "bias", "layer", "head", "neuron", "token×layer")
BUILDS = {"llama": tiny.llama, "llama-biases": partial(tiny.llama, biases=True), "gemma3": tiny.gemma3}
EVERY = (
    "qwen2", "gemma2", "gemma3_text", "olmo2", "gpt2", "bloom", "opt", "phi", "gpt_neox", "gptj", "falcon", "mixtral",
    "jamba", "gpt_oss",
)  # fmt: skip
WHOLE = {"mixtral": ("neuron",), "gpt_oss": ("neuron",), "opt": ("head", "neuron")}
"""Levels that a family has not: a mixture of experts, and blocks whose parts cannot be told apart."""


def of(found: Attribution, kind: str, layer: int | None = None, *, through: bool = False) -> torch.Tensor:
    chosen = found.kinds == KINDS.index(kind)
    if layer is not None:
        chosen &= found.layers == layer
    return (found.through if through else found.shares)[chosen]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def build(request):
    return request.param


@pytest.fixture
def pair(build):
    """A linearization, and the same network by brute force."""
    ids = tiny.prompt(7)
    return linearize(build(), ids, precision="double"), shares_oracle.Network(build(attn="eager"), ids)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(
    ("dtype", "precision", "limit"), [(torch.float64, "double", 1e-12), (torch.float32, "auto", tiny.rounding())]
)
def test_every_level_sums_to_the_target(family, dtype, precision, limit):
    model = families.build(family, dtype=dtype)
    lin = linearize(model, families.prompt(model), precision=precision)
    for by in LEVELS:
        if by in WHOLE.get(family, ()):
            with pytest.raises(OptionError, match="; use by='layer'"):
                lin.attribute(by=by)
            continue
        found = lin.attribute(None if by == "token" else Margin(over="others"), by=by, in_words=0)
        assert found.relative_residual < limit, by
        if precision == "double":  # a target may be small beside what it is the sum of
            assert abs(found.residual) < limit * abs(found.value), by
        assert found.shares.isfinite().all()


@pytest.mark.sampled(7)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("position", [-1, 2])
def test_tokens_are_those_of_brute_force(build, gate, position):
    ids = tiny.prompt(7)
    lin, network = (
        linearize(build(), ids, gate=gate, precision="double"),
        shares_oracle.Network(build(attn="eager"), ids, gate),
    )
    found = lin.attribute(5, position=position)
    logit = network.logits[0, position, 5]
    assert found.value == pytest.approx(logit.item(), rel=1e-12)
    assert far(of(found, "token"), network.by_token(logit)) < 1e-12
    assert [part.token for part in found.parts if part.kind == "token"] == list(range(7))


def test_biases_are_those_of_brute_force():
    ids = tiny.prompt(7)
    lin = linearize(tiny.llama(biases=True), ids, precision="double")
    network = shares_oracle.Network(tiny.llama(biases=True, attn="eager"), ids)
    logit = network.logits[0, -1, 5]
    expected = {
        name: (network.vjp(logit, parameter) * parameter).sum().item()
        for name, parameter in network.model.named_parameters()
        if name.endswith("bias")
    }
    expected = {name: share for name, share in expected.items() if share}
    for by in ("token", "bias"):
        found = {part.name: part.share for part in lin.attribute(5, by=by).parts if part.kind == "bias"}
        assert found == {name: pytest.approx(share, rel=1e-10, abs=1e-12) for name, share in expected.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("position", [-1, 2])
def test_layers_heads_and_neurons_are_those_of_brute_force(pair, position):
    """Direct shares through the frozen final norm; and what passes a part by any way."""
    lin, network = pair
    weights = torch.zeros(tiny.VOCABULARY, dtype=torch.float64)
    weights[5] = 1
    g = network.reading(weights, position)
    logit = network.logits[0, position, 5]
    layers, heads, neurons = (lin.attribute(5, by=by, position=position) for by in ("layer", "head", "neuron"))
    for found in (layers, heads, neurons):
        assert far(of(found, "embed"), (g * network.x[0, position])[None].sum(-1).detach()) < 1e-11
        assert far(of(found, "embed", through=True), network.by_token(logit).sum()[None]) < 1e-11
    for layer in range(3):
        attn, mlp = network.attn[layer], network.mlp[layer]
        direct_attn, direct_mlp = (g * attn[0, position]).sum(), (g * mlp[0, position]).sum()
        through_attn, through_mlp = ((network.vjp(logit, part) * part).sum() for part in (attn, mlp))
        for kind, direct, through in (("attn_out", direct_attn, through_attn), ("mlp_out", direct_mlp, through_mlp)):
            assert of(layers, kind, layer).item() == pytest.approx(direct.item(), rel=1e-10, abs=1e-12)
            assert of(layers, kind, layer, through=True).item() == pytest.approx(through.item(), rel=1e-10, abs=1e-12)
        assert far(of(heads, "head", layer), network.by_head(direct_attn, layer)) < 1e-11
        assert far(of(heads, "head", layer, through=True), network.by_head(logit, layer)) < 1e-11
        assert far(of(neurons, "neuron", layer), network.by_neuron(direct_mlp, layer)) < 1e-11
        assert far(of(neurons, "neuron", layer, through=True), network.by_neuron(logit, layer)) < 1e-11


def test_biases_behind_heads_and_neurons():
    """An attention is its heads and the biases behind them; an MLP its neurons and its last bias."""
    lin = linearize(tiny.llama(biases=True), tiny.prompt(7), precision="double")
    layers, heads, neurons = (lin.attribute(by=by) for by in ("layer", "head", "neuron"))
    for layer in range(3):
        for found, kind, whole, projection in (
            (heads, "head", "attn_out", "self_attn.o_proj"),
            (neurons, "neuron", "mlp_out", "mlp.down_proj"),
        ):
            names = [p.name for p in found.parts if p.kind == "bias" and p.layer == layer]
            assert names == [f"model.layers.{layer}.{projection}.bias"]
            for through in (False, True):
                sums = of(found, kind, layer, through=through).sum() + of(found, "bias", layer, through=through).sum()
                assert sums.item() == pytest.approx(of(layers, whole, layer, through=through).item(), rel=1e-10)


def test_tokens_by_layers_are_those_of_brute_force(pair):
    lin, network = pair
    weights = torch.zeros(tiny.VOCABULARY, dtype=torch.float64)
    weights[5] = 1
    g = network.reading(weights, -1)
    matrix, names = lin.attribute(5, by="token×layer").matrix()
    columns = dict(zip(names, matrix.T, strict=True))
    assert list(columns)[:3] == ["embed", "attn_out.0", "mlp_out.0"]
    for layer in range(3):
        for kind, parts in (("attn_out", network.attn), ("mlp_out", network.mlp)):
            direct = (g * parts[layer][0, -1]).sum()
            assert far(columns[f"{kind}.{layer}"][:-1], network.by_token(direct)) < 1e-11
    assert columns["embed"][:-1].tolist() == pytest.approx([0.0] * 6 + [(g * network.x[0, -1]).sum().item()])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "phi", "opt", "mixtral"])
def test_rows_and_columns_sum_to_tokens_and_layers(family):
    model = families.build(family)
    lin = linearize(model, families.prompt(model), precision="double")
    tokens, layers = lin.attribute(by="token"), lin.attribute(by="layer")
    matrix, names = lin.attribute(by="token×layer").matrix()
    assert far(matrix[:-1].sum(1), of(tokens, "token")) < 1e-12
    assert matrix[-1].sum().item() == pytest.approx(of(tokens, "bias").sum().item(), rel=1e-11, abs=1e-12)
    columns = dict(zip(names, matrix.sum(0).tolist(), strict=True))
    by_layer = {p.name: p.share for p in layers.parts if p.kind != "bias"}
    ends = of(layers, "bias").sum().item()
    assert columns == pytest.approx(by_layer | ({"bias": ends} if "bias" in columns else {}), rel=1e-10, abs=1e-12)


@pytest.mark.slow
def test_a_budget_changes_nothing():
    lin = linearize(tiny.gemma3(), tiny.prompt(7), precision="double")
    tight = within(tiny.gemma3(), tiny.prompt(7), 0, precision="double")
    for by in LEVELS:
        assert far(tight.attribute(by=by).shares, lin.attribute(by=by).shares) < 1e-13


@pytest.mark.slow
def test_what_float32_rounds_too_much_is_swept_again(monkeypatch):
    """As if every sum were off: the float64 sweep has float32's coefficients, and float64's rounding."""
    monkeypatch.setattr("loclin.analyses.attribution.shares._ROUNDING", 0.0)
    for model in (tiny.llama(dtype=torch.float32), families.build("gpt2", dtype=torch.float32)):
        ids = tiny.prompt(7)
        single, double = linearize(model, ids), linearize(model, ids, precision="double")
        for by in LEVELS:
            assert far(single.attribute(5, by=by).shares, double.attribute(5, by=by).shares) < tiny.rounding()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_per_layer_embeddings_are_their_tokens(family):
    """What each token's own rows of the second table give, pushed forward instead of pulled back."""
    model = families.build(family)
    lin = linearize(model, families.prompt(model, 5), precision="double")
    shared, whole = lin.attribute(), lin.attribute(by="bias")
    table = "model.embed_tokens_per_layer"
    assert [(part.name, part.kind) for part in whole.parts] == [("embed", "embed"), (table, "bias")]
    assert [part.kind for part in shared.parts] == ["token"] * 5
    assert [table in warning for warning in shared.warnings] == [True]
    assert shared.residual == pytest.approx(0, abs=1e-12)

    J = lin.jacobian(target="logits")
    weights = J.value.new_full((J.shape[0],), -1 / J.shape[0])
    weights[shared.target["ids"][0]] += 1
    graph = lin.chain.layers[0].graph(collect=True)
    (leaf,) = (leaf for name, leaf in graph.constants if name == table)
    rows = torch.stack([leaf.detach() * (torch.arange(5) == t)[:, None, None] for t in range(5)])
    pushed = OutputHeadLink(lin.trace, 4).jvp(batched_jvp(graph.points["resid_post"], leaf)(rows)[:, 0, -1])
    expected = (J.rmatvec(weights) * J.input).sum(-1) + pushed @ weights
    assert torch.allclose(shared.shares, expected, rtol=1e-10, atol=1e-12)
    assert whole.parts[1].share == pytest.approx((pushed @ weights).sum().item(), rel=1e-10)
    explained = explain(lin, k=1)
    assert [token.share for token in explained.tokens] == shared.shares.tolist()
    assert shared.warnings[0] in explained.warnings


def test_positions_are_not_taken_for_tokens():
    model = torch.nn.ModuleDict({name: torch.nn.Embedding(9, 3) for name in ("words", "positions", "more")})
    for ids, found in ((torch.tensor([[0, 1, 2]]), ["more"]), (torch.tensor([[4, 1, 4]]), ["more", "more"])):
        with frozen(model) as mode:
            handles = mode.look_up(ids, model["words"])
            model["words"](ids)
            kept = [model["positions"](torch.arange(3)[None]), model["more"](ids), model["more"](ids.clone())]
            for handle in handles:
                handle.remove()
        assert [path for path, _ in mode.lookups.values()] == found
        assert len(kept) == 3
