"""Both packaged models, real weights and tokenizers: predictions, exactness, and brute force."""

from __future__ import annotations

import pytest
import torch

import loclin
import oracle
import shares_oracle
from loclin.analyses.layers import explain_layers

pytestmark = pytest.mark.real
NAMES = ["smollm2-135m", "gemma-3-270m"]
PROMPTS = [
    "Hi there",
    "The Golden Gate",
    "The bridge out of Marin is the",
    "In 1969, Neil Armstrong became the first person to walk on the surface of the",
    "There was thunder and lightning all over the sky and the children were afraid of the dark, so they went into the "
    "house and asked their mother to close the windows and light a candle",
]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return loclin.load(request.param)


def test_golden_gate_bridge(model):
    assert loclin.linearize(model, "The Golden Gate").next_tokens(1)[0][0] == " Bridge"


def test_figures_of_the_first_prompt(model):
    words = [word.strip() for word, _ in loclin.linearize(model, "The bridge out of Marin is the").next_tokens(5)]
    assert words[0] == "only"
    assert {"most", "largest"} <= set(words)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_exact_in_single_precision(model, prompt):
    certificate = loclin.linearize(model, prompt).certify()
    assert certificate.passed
    assert certificate.bit_identical
    assert certificate.reconstruction_error < 1e-5


@pytest.mark.parametrize("gate", ["up", "half"])
def test_every_gate_split_is_exact(model, gate):
    certificate = loclin.linearize(model, PROMPTS[2], gate=gate).certify()
    assert certificate.passed
    assert certificate.reconstruction_error < 1e-5


@pytest.mark.long_for("gemma-3-270m")
@pytest.mark.long_for("prompt1")
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[4]])
def test_exact_in_double_precision(model, prompt):
    double = loclin.wrap(_copy(model, torch.float64), model.tokenizer)
    certificate = loclin.linearize(double, prompt, precision="double").certify()
    assert certificate.passed
    assert certificate.reconstruction_error < 1e-13


@pytest.mark.long_for("gemma-3-270m")
def test_dense_agrees_with_brute_force(model):
    """Rows by one backward pass each, on a model frozen by rewriting its classes."""
    rows = [0, 7, 311, 500]
    for dtype, precision, limit in [(torch.float32, "stock", 1e-4), (torch.float64, "double", 1e-12)]:
        eager = _copy(model, dtype)
        eager.set_attn_implementation("eager")
        lin = loclin.linearize(loclin.wrap(_copy(model, dtype), model.tokenizer), PROMPTS[2], precision=precision)
        expected, _, _ = oracle.jacobian(eager, lin.input_ids, -1, rows=rows)
        dense = lin.jacobian().dense()[rows]
        assert (dense - expected).norm() < limit * expected.norm()


def test_shares_sum_to_the_logit(model):
    found = loclin.explain(loclin.linearize(model, "The Golden Gate"), k=2)
    assert found.target["text"] == " Bridge"
    assert abs(found.share_residual) < 2e-5 * abs(found.target["logit"])


@pytest.mark.long_for("gemma-3-270m")
@pytest.mark.long_for("The bridge out of Marin")
@pytest.mark.parametrize("by", ["token", "bias", "layer", "head", "neuron", "token×layer"])
@pytest.mark.parametrize("prompt", PROMPTS[1:3])
def test_every_level_sums_to_the_logit(model, prompt, by):
    lin = loclin.linearize(model, prompt)
    for target in (None, loclin.Margin()):
        found = lin.attribute(target, by=by, in_words=4)
        assert found.relative_residual < 1e-5
        assert abs(found.residual) < 1e-5 * abs(lin.value("logits")[-1].max().item())


@pytest.mark.long_for("gemma-3-270m")
def test_shares_agree_with_brute_force(model):
    """Tokens, heads and neurons by autograd through a model frozen by rewriting its classes."""
    eager = _copy(model, torch.float64)
    eager.set_attn_implementation("eager")
    lin = loclin.linearize(loclin.wrap(_copy(model, torch.float64), model.tokenizer), PROMPTS[1], precision="double")
    bridge = model.tokenizer(" Bridge", add_special_tokens=False)["input_ids"][0]
    network = shares_oracle.Network(eager, lin.input_ids)
    logit, weights = network.logits[0, -1, bridge], torch.zeros(network.logits.shape[-1], dtype=torch.float64)
    weights[bridge] = 1
    g = network.reading(weights, -1)
    tokens, heads, neurons = (lin.attribute(" Bridge", by=by) for by in ("token", "head", "neuron"))
    assert tokens.value == pytest.approx(logit.item(), rel=1e-12)
    assert torch.allclose(tokens.shares, network.by_token(logit), rtol=1e-10, atol=1e-11)
    for layer in (0, 9, 17):
        attn, mlp = ((g * parts[layer][0, -1]).sum() for parts in (network.attn, network.mlp))
        for found, kind, direct, through in (
            (heads, "head", network.by_head(attn, layer), network.by_head(logit, layer)),
            (neurons, "neuron", network.by_neuron(mlp, layer), network.by_neuron(logit, layer)),
        ):
            mine = [part for part in found.parts if (part.kind, part.layer) == (kind, layer)]
            assert torch.allclose(
                torch.tensor([p.share for p in mine], dtype=torch.float64), direct, rtol=1e-9, atol=1e-11
            )
            passing = torch.tensor([p.through for p in mine], dtype=torch.float64)
            assert torch.allclose(passing, through, rtol=1e-9, atol=1e-11)


@pytest.mark.long_for("gemma-3-270m")
def test_a_target_of_two_tokens_is_their_sum(model):
    lin = loclin.linearize(model, PROMPTS[1])
    found = lin.attribute(" Bridge is")
    longer = lin.followed_by(found.target["ids"][0])
    alone = [
        longer.attribute(token, position=at).value for token, at in zip(found.target["ids"], (-2, -1), strict=True)
    ]
    assert found.value == pytest.approx(sum(alone), rel=1e-6)
    assert found.relative_residual < 1e-6
    assert any("is 2 tokens: ' Bridge' + ' is'." in text for text in found.warnings)


def test_heads_and_paths(model):
    lin = loclin.linearize(model, PROMPTS[1])
    (top,) = lin.attribute(" Bridge", by="head", in_words=1).top(1, "head")
    head = lin.head(top.layer, top.index, " Bridge", k=2)
    assert head.share == pytest.approx(top.share, rel=1e-4)
    assert head.attends.sum().item() + head.bias == pytest.approx(top.share, rel=1e-4)
    assert head.triples[0].value >= head.triples[1].value > 0
    last, names = len(lin.tokens) - 1, ["L2H1", top.name]
    at = [lin.path([f"L2H1@{position}", top.name], " Bridge").share for position in range(last + 1)]
    assert sum(at) == pytest.approx(lin.path(names, " Bridge").share, rel=1e-3, abs=1e-7)


@pytest.mark.long
def test_every_layer_is_exact(model):
    """Some of Gemma's single-precision attention outputs are off by more than 1e-6, and so are the model's own."""
    found = explain_layers(loclin.linearize(model, "The Golden Gate", precision="double"), k=2)
    assert found.passed
    assert found.largest_error < 1e-12


@pytest.mark.long
def test_the_word_appears_with_depth(model):
    found = explain_layers(loclin.linearize(model, "The Golden Gate"), k=4)
    assert found.largest_error < 3e-5
    assert found.target["text"] == " Bridge"
    assert found.lens[-1].rank == 1
    assert found.lens[-1].probability == pytest.approx(found.target["probability"], rel=1e-4)
    assert found.lens[0].rank > 10
    assert 0 < found.appears["lens"] <= found.leads["lens"]
    assert found.main.path[-1] == pytest.approx([1, 1], abs=1e-5)


def _copy(model, dtype):
    other = type(model.hf)(model.hf.config)
    other.load_state_dict(model.hf.state_dict())
    other.tie_weights()
    return other.to(dtype).eval()
