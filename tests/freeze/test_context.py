"""Freezing holds what it should, changes no output, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from loclin.freeze import FreezeOptions, frozen, register, table
from loclin.linearization import linearize

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


def _run(model, ids, options=None):
    """A frozen pass of the decoder: x and y on the linear path, and the mode."""
    hidden = model.get_input_embeddings()(ids).detach()
    with frozen(model, options) as mode, torch.no_grad():
        x = mode.enter(hidden)
        y = model.get_decoder()(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return x, mode.live(y), mode


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_forward_is_bit_identical(build, attn, dtype, gate):
    model, ids = build(dtype=dtype, attn=attn), tiny.prompt(9)
    hidden = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        stock = model(inputs_embeds=hidden).logits
        with frozen(model, FreezeOptions(gate)) as mode:
            mode.enter(hidden)
            held = model(inputs_embeds=hidden).logits
        assert mode.status(held) is not None
    assert torch.equal(stock, held)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_everything_is_restored(build):
    model = build().train()
    model.lm_head.weight.requires_grad_(False)
    before = _state(model)
    _run(model, tiny.prompt())
    assert _state(model) == before


def test_restored_after_an_error():
    model = tiny.llama()
    before = _state(model)
    with pytest.raises(KeyboardInterrupt), frozen(model):
        raise KeyboardInterrupt
    assert _state(model) == before


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_graph_is_linear(build, attn, gate):
    """The gradient does not depend on the input: the second derivative is zero, or there is none at all."""
    x, y, mode = _run(build(attn=attn), tiny.prompt(), FreezeOptions(gate))
    assert not mode.nonlinear_uses
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.abs().max() > 0
    second = torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0] if gradient.requires_grad else None
    assert second is None or second.abs().max() == 0
    (pulled,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert (pulled * x).sum().item() == pytest.approx(y.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("missing", ["silu", "mul", "linear", "scaled_dot_product_attention", "add", "matmul"])
def test_each_handler_is_needed(missing, monkeypatch):
    """Without any one of them the map is not exact, and it is said where."""
    monkeypatch.setattr(table, "HANDLERS", {k: v for k, v in table.HANDLERS.items() if k != missing})
    monkeypatch.setattr("loclin.freeze.mode.HANDLERS", table.HANDLERS)
    attn = "eager" if missing == "matmul" else "sdpa"
    _, _, mode = _run(tiny.llama(attn=attn), tiny.prompt())
    if missing == "silu":  # covered by the rule for activation modules
        assert not mode.nonlinear_uses
    else:
        assert mode.nonlinear_uses[0].origin.operation == missing


def test_a_rule_that_does_not_fit_is_refused_by_name():
    from loclin.errors import NotExactError

    class OddNorm(nn.Module):
        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    odd = nn.Sequential(nn.Linear(8, 8), OddNorm())
    hidden = torch.randn(2, 8)
    with register(OddNorm, lambda call: 2 * call.live(call.args[0])), frozen(odd, name="layers.3") as mode:
        mode.enter(hidden)
        with pytest.raises(NotExactError, match=r"layers\.3\.1: "):
            odd(hidden)


def test_other_tensors_run_as_they_are_inside_the_context():
    """What does not depend on the input keeps its own gradients."""
    ours, other, ids = tiny.llama(), tiny.llama(seed=5), tiny.prompt()

    def gradient():
        x = other.get_input_embeddings()(ids).detach().requires_grad_()
        y = other.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
        return torch.autograd.grad(y.sum(), x)[0]

    expected = gradient()
    with frozen(ours):
        assert torch.equal(gradient(), expected)


def test_two_threads_do_not_disturb_one_another():
    model = tiny.llama()
    prompts = [tiny.prompt(seed=seed) for seed in range(6)]
    expected = [_run(model, ids)[1] for ids in prompts]
    found = [None] * len(prompts)

    def work(index):
        found[index] = _run(model, prompts[index])[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_unknown_options_are_refused():
    """In a process of its own: here the run-time type check would refuse first."""
    code = """
from loclin.errors import OptionError
from loclin.freeze import FreezeOptions

for options in (("sideways", "stock"), ("up", "quadruple")):
    try:
        FreezeOptions(*options)
    except OptionError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gate, precision = run.stdout.splitlines()
    assert "choose one of activation, up, half" in gate
    assert "choose one of auto, stock, single" in precision


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("folder", "named"), [("torch", False), ("torchao", True), ("torch_mine", True)])
def test_a_culprits_line_is_in_whatever_is_not_torchs_own(folder, named):
    """Beside torch lie packages whose names begin like its own."""
    file = Path(torch.__file__).parent.with_name(folder) / "kernel.py"
    exec(compile("def bend(x):\n    return x.tanh()", str(file), "exec"), namespace := {})
    model = tiny.llama(dtype=torch.float32)
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: namespace["bend"](output))
    (culprit,) = linearize(model, tiny.prompt(), strict=False).certify().culprits
    assert culprit.line.startswith("kernel.py:" if named else "test_context.py:")
