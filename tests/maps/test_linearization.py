"""What a linearization says of a prompt, and the prompts it refuses."""

from __future__ import annotations

import pytest
import torch

import loclin
import tiny
from loclin.errors import OptionError, PromptError
from loclin.linearization import linearize
from loclin.models.prompts import prompt_list


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"shape \[1, T\]"),
        (torch.zeros(2, 3, dtype=torch.long), r"shape \[1, T\]"),
        (torch.tensor(3), r"shape \[1, T\]"),
        (torch.tensor([[5, 61]]), "from 0 to 60"),
        (torch.tensor([[-1, 5]]), "from 0 to 60"),
        (torch.tensor([[1.0, 2.0]]), "whole numbers"),
        (torch.full((1, 65), 5), "65 tokens; .* takes at most 64"),
    ],
)
def test_impossible_ids_are_refused(ids, message):
    with pytest.raises(PromptError, match=message):
        linearize(tiny.llama(), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_double_sweeps_of_a_less_precise_model(dtype):
    """The coefficients are the model's own, the algebra is in float64, and both errors are told apart."""
    lin = linearize(tiny.llama(dtype=dtype), tiny.prompt(), precision="double")
    certificate = lin.certify()
    assert certificate.passed
    assert lin.jacobian().dense().dtype == torch.float64
    assert certificate.reconstruction_error < 1e-14
    assert (
        1e-9
        < certificate.forward_error
        < {torch.float32: tiny.rounding(), torch.float16: 1e-2, torch.bfloat16: 0.1}[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_have_sweeps_in_single(dtype):
    lin = linearize(tiny.gemma3(dtype=dtype), tiny.prompt())
    certificate = lin.certify()
    assert certificate.passed
    assert lin.precision == "single"
    assert lin.jacobian().dense().dtype == torch.float32
    assert certificate.reconstruction_error < tiny.rounding()
    assert certificate.bit_identical
    assert certificate.forward_error > 1e-4


def test_values_and_predictions_are_the_models():
    model, ids = tiny.gemma3(dtype=torch.float32), tiny.prompt(6)
    lin = linearize(model, ids)
    with torch.no_grad():
        stock = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(lin.embeddings, stock.hidden_states[0][0])
    assert torch.equal(lin.value("resid_post.0"), stock.hidden_states[1][0])
    assert torch.equal(lin.value("final"), stock.hidden_states[-1][0])
    assert torch.allclose(lin.value("logits"), stock.logits[0], atol=1e-4)
    probabilities = stock.logits[0, 2].double().softmax(-1)
    (best, *_) = lin.next_tokens(3, position=2)
    assert best == (str(probabilities.argmax().item()), pytest.approx(probabilities.max().item(), rel=1e-4))
    assert lin.tokens == [str(i) for i in ids[0].tolist()]


def test_the_same_map_is_the_same_object():
    lin = linearize(tiny.llama(), tiny.prompt())
    assert lin.jacobian() is lin.jacobian("embed", "final", position=6)
    assert lin.jacobian(target="resid_post.-1") is lin.jacobian(target="resid_post.2")


def test_attention_received_is_a_mean_over_later_queries():
    model, ids = tiny.llama(attn="eager"), tiny.prompt(5)
    with torch.no_grad():
        attentions = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0]
    expected = [attentions[:, :, i + 1 :, i].mean().item() for i in range(4)]
    assert linearize(model, ids).trace.attention_received.tolist() == pytest.approx([*expected, 0.0], abs=1e-6)


def test_a_sink_is_found():
    lin = linearize(tiny.llama(), tiny.prompt(5))
    lin.trace.attention_received = torch.tensor([0.7, 0.1, 0.05, 0.1, 0.0])
    assert lin.sinks == [0]
    even = linearize(tiny.llama(), tiny.prompt(5))
    even.trace.attention_received = torch.tensor([0.35, 0.3, 0.3, 0.4, 0.0])
    assert even.sinks == []


@pytest.mark.parametrize(
    "name",
    [
        *("attribute", "explain", "explain_layers", "explore", "generate", "logit_lens", "patch", "similarity"),
        *("validity", "watch"),
    ],
)
@pytest.mark.parametrize("given", [3, None, "a text"])
def test_questions_are_about_a_linearized_prompt(name, given):
    with pytest.raises(OptionError, match=f"{name} takes a linearized prompt, not {type(given).__name__}"):
        getattr(loclin, name)(given)


@pytest.mark.parametrize("prompts", [None, 3])
def test_several_prompts_are_a_list(prompts):
    with pytest.raises(PromptError, match="give a list of texts or of token ids"):
        prompt_list(prompts)
