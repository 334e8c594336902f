"""Freezing holds what it should, changes no output, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from loclin.errors import NotExactError
from loclin.freeze import Hold, frozen

MODELS = {"llama": tiny.llama, "gemma3": tiny.gemma3}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _state(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        ["forward" in vars(module) for module in model.modules()],
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        model.config._attn_implementation,
    )


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_forward_is_bit_identical(build, attn, dtype, gate):
    model, ids = build(dtype=dtype, attn=attn), tiny.prompt(9)
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        with frozen(model, Hold(gate)):
            held = model(input_ids=ids).logits
    assert torch.equal(stock, held)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_everything_is_restored(build):
    model = build().train()
    model.lm_head.weight.requires_grad_(False)
    before = _state(model)
    with frozen(model), torch.no_grad():
        model(input_ids=tiny.prompt())
    assert _state(model) == before


def test_restored_after_an_error():
    model = tiny.llama()
    before = _state(model)
    with pytest.raises(KeyboardInterrupt), frozen(model):
        raise KeyboardInterrupt
    assert _state(model) == before


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_graph_is_linear(build, gate):
    """The gradient does not change when what it is taken along changes, and the second derivative is zero."""
    model, ids = build(), tiny.prompt()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with frozen(model, Hold(gate)):
        y = model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.abs().max() > 0
    second = torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0] if gradient.requires_grad else None
    assert second is None or second.abs().max() == 0


def test_each_role_is_needed():
    """Without any one rule the map is no longer exact: none of them is idle."""
    from loclin.freeze import rules

    for build in MODELS.values():
        for rule in rules.RULES:
            if rule.role == "norm" and "layer" in rule.install.__name__:
                continue
            fewer = tuple(other for other in rules.RULES if other is not rule)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rules, "RULES", fewer)
                model, ids = build(), tiny.prompt()
                x = model.get_input_embeddings()(ids).detach().requires_grad_()
                with frozen(model):
                    y = model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
                (pulled,) = torch.autograd.grad((y * y.detach()).sum(), x)
                rebuilt, norm = (pulled * x).sum(), y.square().sum()
            assert abs(rebuilt - norm) > 1e-3 * norm, rule.role


def test_a_rule_that_does_not_fit_is_refused_by_name():
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    odd = nn.Sequential(nn.Linear(8, 8), OddRMSNorm())
    with frozen(odd, name="layers.3"), pytest.raises(NotExactError, match=r"layers\.3\.1: "):
        odd(torch.randn(2, 8))


def test_other_models_run_as_they_are_inside_the_context():
    """The attention registry is shared by the process: a model that is not being frozen keeps its own gradients."""
    ours, other, ids = tiny.llama(), tiny.llama(seed=5), tiny.prompt()

    def gradient():
        x = other.get_input_embeddings()(ids).detach().requires_grad_()
        y = other.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
        return torch.autograd.grad(y.sum(), x)[0]

    expected = gradient()
    with frozen(ours):
        assert torch.equal(gradient(), expected)


def test_unknown_options_are_refused():
    """In a process of its own: here the run-time type check would refuse first."""
    code = "from loclin.freeze import Hold; Hold({!r}, {!r})"
    for options, message in [(("sideways", "stock"), "activation, up, half"), (("up", "quadruple"), "stock, double")]:
        run = subprocess.run([sys.executable, "-c", code.format(*options)], capture_output=True, text=True, check=False)
        assert f"choose one of {message}" in run.stderr
