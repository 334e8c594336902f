"""Certificates pass where the map is exact, fail where it is not, and then name the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from loclin.errors import NotExactError
from loclin.linearization import linearize
from loclin.maps.certificate import certify
from loclin.maps.linear_map import LinearMap

BUILDS = {
    "llama": tiny.llama,
    "llama-tied": lambda **kwargs: tiny.llama(tied=True, **kwargs),
    "llama-biases": lambda **kwargs: tiny.llama(biases=True, **kwargs),
    "gemma3": tiny.gemma3,
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize(
    ("dtype", "precision", "limit"),
    [
        (torch.float32, "stock", tiny.rounding()),
        (torch.float64, "stock", tiny.rounding()),
        (torch.float64, "double", tiny.rounding(torch.float64)),
    ],
    ids=["single", "double-stock", "double"],
)
@pytest.mark.parametrize("length", [2, 7, 40])
def test_exact_models_pass(build, gate, dtype, precision, limit, length):
    certificate = linearize(build(dtype=dtype), tiny.prompt(length), gate=gate, precision=precision).certify()
    assert certificate.passed
    assert certificate.culprits == ()
    assert certificate.reconstruction_error < limit
    assert certificate.second_derivative == 0
    assert certificate.bit_identical == (precision == "stock")


def test_biases_have_their_share():
    assert linearize(tiny.llama(biases=True), tiny.prompt()).certify().bias_share > 0.1
    assert linearize(tiny.llama(), tiny.prompt()).certify().bias_share == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_a_fault_of_a_thousandth_is_no_rounding(monkeypatch, gate):
    """What cancels loosens the bound, and hides no fault."""
    lin = linearize(tiny.llama(dtype=torch.float32), tiny.prompt(40), gate=gate)
    assert 3e-6 <= certify(lin.jacobian()).tolerance <= 1e-4
    right = LinearMap.matmat
    monkeypatch.setattr(LinearMap, "matmat", lambda self, x: 1.001 * right(self, x))
    assert not certify(lin.jacobian()).passed


class _Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def test_an_unknown_nonlinearity_is_named():
    model = tiny.llama(dtype=torch.float32)
    projection = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = nn.Sequential(projection, _Tanh())
    certificate = linearize(model, tiny.prompt(), strict=False).certify()
    assert not certificate.passed
    (culprit,) = certificate.culprits
    assert (culprit.module, culprit.kind) == ("model.layers.1.self_attn.o_proj.1", "_Tanh")
    assert culprit.operation == "tanh"
    assert culprit.line.startswith("test_certify.py:")
    assert culprit.error > 0.01
    with pytest.raises(NotExactError, match=r"layers\.1\.self_attn\.o_proj\.1 \(_Tanh\): tanh at test_certify"):
        linearize(model, tiny.prompt())


def test_a_nonlinearity_between_gate_and_down_projection_is_refused():
    model = tiny.llama(dtype=torch.float32)
    down = model.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(lambda _module, args: (torch.tanh(args[0]),))
    with pytest.raises(NotExactError, match=r"layers\.2\.mlp"):
        linearize(model, tiny.prompt())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("place", ["self_attn.v_proj", "mlp.down_proj", "mlp", "post_attention_layernorm", ""])
@pytest.mark.parametrize("kind", [_Tanh, nn.Tanh, nn.Sigmoid, nn.Softmax])
def test_a_nonlinearity_anywhere_on_the_way_is_refused_by_name(place, kind):
    model = tiny.llama(dtype=torch.float32)
    layer = model.model.layers[1]
    extra = kind(-1) if kind is nn.Softmax else kind()
    where = f"model.layers.1.{place}.extra".replace("..", ".")
    if place:
        owner, _, name = place.rpartition(".")
        broken = nn.Sequential()
        broken.add_module("inner", layer.get_submodule(place))
        broken.add_module("extra", extra)
        setattr(layer.get_submodule(owner), name, broken)
    else:
        layer.extra = extra
        layer.register_forward_hook(lambda module, _args, output: module.extra(output))
    with pytest.raises(NotExactError, match=where.replace(".", r"\.")):
        linearize(model, tiny.prompt())


@pytest.mark.processor
def test_an_operation_that_cannot_be_seen_is_refused():
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x, weight):
            return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)

    class Fused(nn.Linear):
        def forward(self, x):
            return Kernel.apply(x, self.weight)

    model = tiny.llama(dtype=torch.float32)
    old = model.model.layers[2].mlp.down_proj
    model.model.layers[2].mlp.down_proj = Fused(old.in_features, old.out_features, bias=False)
    with pytest.raises(NotExactError, match=r"layers\.2\.mlp\.down_proj \(Fused\): an operation .* cannot see"):
        linearize(model, tiny.prompt())


def test_a_model_in_training_mode_works_and_stays_in_it():
    model = tiny.llama(dtype=torch.float32)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = linearize(model, tiny.prompt()).jacobian().dense()
    model.train()
    lin = linearize(model, tiny.prompt())
    assert lin.certify().passed
    assert torch.equal(lin.jacobian().dense(), expected)
    assert all(module.training for module in model.modules())


def test_culprits_are_json():
    import json

    assert json.loads(json.dumps(linearize(tiny.llama(), tiny.prompt()).certify().to_dict()))["passed"] is True
