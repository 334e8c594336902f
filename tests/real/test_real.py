"""Both packaged models, real weights and tokenizers: predictions, exactness, and brute force."""

from __future__ import annotations

import pytest
import torch

import loclin
import oracle
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
    assert certificate.reconstruction_error < 1e-6


@pytest.mark.parametrize("gate", ["up", "half"])
def test_every_gate_split_is_exact(model, gate):
    """The gate's branch has twice the rounding of up's: its coefficients are quotients."""
    certificate = loclin.linearize(model, PROMPTS[2], gate=gate).certify()
    assert certificate.passed
    assert certificate.reconstruction_error < (2e-6 if gate == "up" else 1e-6)


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[4]])
def test_exact_in_double_precision(model, prompt):
    double = loclin.wrap(_copy(model, torch.float64), model.tokenizer)
    certificate = loclin.linearize(double, prompt, precision="double").certify()
    assert certificate.passed
    assert certificate.reconstruction_error < 1e-13


def test_dense_agrees_with_brute_force(model):
    """Rows by one backward pass each, on a model frozen by rewriting its classes."""
    rows = [0, 7, 311, 500]
    for dtype, precision, limit in [(torch.float32, "stock", 1e-5), (torch.float64, "double", 1e-12)]:
        eager = _copy(model, dtype)
        eager.set_attn_implementation("eager")
        lin = loclin.linearize(loclin.wrap(_copy(model, dtype), model.tokenizer), PROMPTS[2], precision=precision)
        expected, _, _ = oracle.jacobian(eager, lin.input_ids, -1, rows=rows)
        dense = lin.jacobian().dense()[rows]
        assert (dense - expected).norm() < limit * expected.norm()


def test_shares_sum_to_the_logit(model):
    found = loclin.explain(loclin.linearize(model, "The Golden Gate"), k=2)
    assert found.target["text"] == " Bridge"
    assert abs(found.share_residual) < 2e-6 * abs(found.target["logit"])


def test_every_layer_is_exact_and_the_word_appears(model):
    found = explain_layers(loclin.linearize(model, "The Golden Gate"), k=4)
    assert found.passed
    assert found.largest_error < 2e-6
    assert found.target["text"] == " Bridge"
    assert found.lens[-1].rank == 1
    assert found.lens[-1].probability == pytest.approx(found.target["probability"], rel=1e-4)
    assert found.lens[0].rank > 10
    assert found.appears["resid_post joint"] is not None
    assert found.main.path[-1] == pytest.approx([1, 1], abs=1e-5)


def _copy(model, dtype):
    other = type(model.hf)(model.hf.config)
    other.load_state_dict(model.hf.state_dict())
    other.tie_weights()
    return other.to(dtype).eval()
