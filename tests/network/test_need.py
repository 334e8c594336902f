"""A budget bounds what a prompt takes, and one that is too small is refused before anything is run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loclin
import tiny
from least import least, named, within
from loclin.errors import BudgetError, ModelError
from loclin.freeze import FreezeOptions
from loclin.linearization import linearize
from loclin.models import tiny as families
from loclin.network import memory
from loclin.network.memory import Allowance
from loclin.network.need import allow

BUILT = {
    "llama": tiny.llama,
    "gemma3": tiny.gemma3,
    "eager": lambda: tiny.llama(attn="eager"),
    "gpt2": lambda: families.build("gpt2", dtype=torch.float64),
    "mixtral": lambda: families.build("mixtral", dtype=torch.float64),
}


@pytest.fixture(params=BUILT)
def model(request):
    return BUILT[request.param]()


def test_the_least_works_and_one_byte_less_is_refused_before_anything_runs(model):
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    needed = least(model, tiny.prompt(7))
    with pytest.raises(BudgetError, match=f"give memory={needed}, or fewer tokens"):
        linearize(model, tiny.prompt(7), memory=needed - 1)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: passes.append(None))
    with pytest.raises(BudgetError):
        linearize(model, tiny.prompt(7), memory=needed - 1)
    assert not passes
    for module in model.modules():
        module._forward_pre_hooks.clear()
    tight, free = linearize(model, tiny.prompt(7), memory=needed), linearize(model, tiny.prompt(7))
    assert tight.certify().passed
    expected = free.jacobian().dense()
    assert (tight.jacobian().dense() - expected).norm() <= 1e-9 * expected.norm()
    for by in ("token", "layer", "token×layer"):
        shares = free.attribute(by=by, progress=False).shares
        found = tight.attribute(by=by, progress=False).shares
        assert (found - shares).norm() <= 1e-9 * shares.norm()


@pytest.mark.parametrize("length", [1, 5, 40])
def test_what_is_kept_is_counted(length):
    for dtype in (torch.float32, torch.float64):
        lin = within(tiny.llama(dtype=dtype), tiny.prompt(length), 0)
        held = [call.value for call in lin.trace.layers] + lin.trace.attn_out + [lin.trace.final, lin.trace.end.value]
        assert sum(part.nbytes for part in held if part is not None) <= lin.allowance.kept
        assert lin.allowance.spare == lin.allowance.coefficients == lin.allowance.pattern == 0


def test_analyses_of_every_token_s_map_name_what_they_need():
    model, ids = tiny.llama(), tiny.prompt(7)
    free, lin = linearize(model, ids), within(model, ids, 0)
    for ask in (
        lambda lin: lin.jacobian().svd(2).S,
        lambda lin: lin.jacobian().svd(2, joint=True).S,
        lambda lin: lin.jacobian().singular_values(),
        lambda lin: lin.layer_spectra(k=2).S,
    ):
        with pytest.raises(BudgetError) as refused:
            ask(lin)
        needed = named(refused.value)
        with pytest.raises(BudgetError):
            ask(linearize(model, ids, memory=needed - 1))
        assert torch.allclose(ask(linearize(model, ids, memory=needed)), ask(free), rtol=2e-3)


def test_explain_says_the_same_some_tokens_at_a_time(directory):
    model = loclin.load(str(directory))
    text, options = "w3 w4 w5 w6 w7 w3 w8 w9 w4 w4 w3 w5", {"precision": "double"}
    free = loclin.linearize(model, text, **options)
    d = free.trace.width
    lin = within(model, text, 14 * d * d * 8, **options)
    found, expected = lin.explain(k=2, progress=False), free.explain(k=2, progress=False)
    assert lin.jacobian().cached_dense is None
    for own, other in zip(found.tokens, expected.tokens, strict=True):
        assert own.singular_values == pytest.approx(other.singular_values, rel=1e-5, abs=1e-6)
        assert own.frobenius_norm == pytest.approx(other.frobenius_norm, rel=1e-5)
        assert [unit.index for unit in own.rows] == [unit.index for unit in other.rows]
        assert [unit.index for unit in own.columns] == [unit.index for unit in other.columns]


def test_the_least_for_something_more():
    for extra in (0, 1, 2, 3, 7, 100, 10**9 + 1):
        needed = Allowance(0, 10, 5).least(extra)
        assert Allowance(needed, 10, 5).spare >= extra
        assert extra == 0 or Allowance(needed - 1, 10, 5).spare < extra


def test_default_budgets_grow_as_far_as_memory_is_free(monkeypatch):
    model = loclin.wrap(tiny.llama())
    monkeypatch.setattr(memory, "available", lambda _device: 200_000)  # a quarter is too little
    assert allow(model, 5, FreezeOptions("activation", "auto"), None).total > 50_000
    with pytest.raises(BudgetError, match="fewer tokens"):
        allow(model, 500, FreezeOptions("activation", "auto"), None)


def test_a_hundred_thousand_tokens_are_refused_at_once():
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=10**6, **sizes)).eval()
    ids = torch.zeros(1, 100_000, dtype=torch.long)
    with pytest.raises(BudgetError, match="fewer tokens"):
        loclin.linearize(model, ids, memory="1GB")


def test_a_layer_with_nan_weights_is_named():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\."):
        linearize(model, tiny.prompt(5))
