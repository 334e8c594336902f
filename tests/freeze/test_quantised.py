"""Quantised linear layers are affine with their dequantised weights, or refused by name."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import loclin
import tiny
from loclin.errors import NotExactError
from loclin.freeze import quantised, register
from loclin.linearization import linearize
from loclin.maps.linear_map import LinearMap
from loclin.models import tiny as families
from loclin.models.four_bit import PACKING
from loclin.network.chain import Chain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    BNB = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.fixture(scope="module")
def plain():
    """Qwen2 has biases on Q, K and V, of which V's reaches the output."""
    return families.build("qwen2", dtype=torch.float32)


@pytest.fixture(scope="module")
def directory(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(path)
    return path


def four_bit(directory, dtype="float32", **changes):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **changes}
    return loclin.load(directory, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings))


def dequantised(model, plain, dtype=torch.float32):
    """The same network in plain layers."""
    twin = copy.deepcopy(plain).to(dtype)
    for name, module in model.named_modules():
        if quantised.is_quantised(module):
            with torch.no_grad():
                twin.get_submodule(name).weight.copy_(quantised.dense_weight(module))
    return twin


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "nested", "dtype"), [("nf4", False, "float32"), ("nf4", True, "bfloat16"), ("fp4", False, "float16")]
)
def test_four_bits_are_exact(directory, kind, nested, dtype):
    model = four_bit(directory, dtype, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    certificate = linearize(model, tiny.prompt(6)).certify()
    assert certificate.passed
    assert certificate.reconstruction_error < tiny.rounding()


def test_the_map_is_that_of_the_dequantised_model(directory, plain):
    model = four_bit(directory)
    twin = dequantised(model.hf, plain)
    here, there = (linearize(m, tiny.prompt(6)) for m in (model, twin))
    J, K = here.jacobian().dense(), there.jacobian().dense()
    assert (J - K).norm() <= tiny.rounding() * K.norm()
    assert here.chain.layers[0].constants().keys() == there.chain.layers[0].constants().keys()
    assert any(name.endswith("v_proj.bias") for name in here.chain.layers[0].constants())
    a, b = here.ordinary_reconstruction(), there.ordinary_reconstruction()
    assert (a - b).norm() <= 10 * tiny.rounding() * b.norm()


def test_double_precision(directory):
    assert linearize(four_bit(directory), tiny.prompt(3), precision="double").certify().reconstruction_error < 1e-12


def test_explicit_products(tmp_path):
    families.build("llama", dtype=torch.float32).save_pretrained(tmp_path)
    lin = linearize(four_bit(tmp_path), tiny.prompt(6))
    assert all(lin.trace.explicit)
    J = lin.jacobian()
    generic = LinearMap(Chain(lin.trace, explicit=False), J.source, J.target, J.position).dense()
    assert (J.dense() - generic).norm() <= tiny.rounding() * generic.norm()


def test_one_dequantisation_a_graph(directory, monkeypatch):
    lin = linearize(four_bit(directory), tiny.prompt(6))
    count = []
    plain = quantised.dense_weight
    monkeypatch.setattr(quantised, "dense_weight", lambda module: count.append(module) or plain(module))
    list(lin.chain.layers[0].vjp(torch.randn(9, 6, lin.trace.width), chunk=2))
    assert len(count) == len(set(count)) == 7


def test_a_coarser_kernel_than_the_model_is_refused(directory):
    model = four_bit(directory, bnb_4bit_compute_dtype=torch.bfloat16)
    with pytest.raises(NotExactError, match=r"q_proj computes in bfloat16.*bnb_4bit_compute_dtype=torch.float32"):
        linearize(model, tiny.prompt(6))


def test_a_bfloat16_kernel_is_not_taken_by_what_loclin_loads(directory):
    layers = [m for m in four_bit(directory).hf.modules() if quantised.is_quantised(m)]
    assert layers
    assert not any(quantised.packs(layer) for layer in layers)
    setattr(layers[0], PACKING, True)
    assert quantised.packs(layers[0])
    assert quantised.compute_dtype(layers[0], torch.float32) == torch.bfloat16


def test_a_bfloat16_kernel_is_refused_with_what_to_do(directory, monkeypatch):
    model = four_bit(directory)
    monkeypatch.setattr(quantised, "packs", lambda _module: True)
    with pytest.raises(NotExactError, match=r"q_proj computes in bfloat16.*load it with loclin\.load"):
        linearize(model, tiny.prompt(6))


def test_a_wrong_weight_is_noticed(directory, monkeypatch):
    model, plain = four_bit(directory), quantised.dense_weight
    monkeypatch.setattr(quantised, "dense_weight", lambda module: 1.01 * plain(module))
    with pytest.raises(NotExactError, match=r"q_proj: its affine form differs"):
        linearize(model, tiny.prompt(6))


def test_eight_bits_round_the_input(directory):
    model = loclin.load(directory, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(NotExactError, match=r"q_proj \(bitsandbytes Linear8bitLt\) .* rounds its input"):
        linearize(model, tiny.prompt(6))


class Packed(nn.Module):
    """A layer of an unknown library."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("qweight", (layer.weight.detach() * 20).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 20)


def test_an_unknown_kind_is_refused_until_it_is_registered(plain):
    model = copy.deepcopy(plain)
    model.model.layers[1].mlp.down_proj = Packed(model.model.layers[1].mlp.down_proj)
    with pytest.raises(NotExactError, match=r"layers\.1\.mlp\.down_proj \(\S+ Packed\) has quantised weights, and"):
        linearize(model, tiny.prompt(6))
    with register(Packed, lambda call: nn.functional.linear(call.live(call.args[0]), call.module.qweight / 20)):
        assert linearize(model, tiny.prompt(6)).certify().passed


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights(torchao, plain, kind):
    model = copy.deepcopy(plain)
    torchao.quantize_(model, getattr(torchao, kind)())
    lin = linearize(model, tiny.prompt(6))
    assert lin.certify().passed
    twin = linearize(dequantised(model, plain), tiny.prompt(6))
    K = twin.jacobian().dense()
    assert (lin.jacobian().dense() - K).norm() <= tiny.rounding() * K.norm()


def test_torchao_that_rounds_the_input(torchao, plain):
    model = copy.deepcopy(plain)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(NotExactError, match="rounds its input"):
        linearize(model, tiny.prompt(6))


@pytest.mark.long  # the library compiles an extension
def test_quanto(plain):
    quanto = pytest.importorskip("optimum.quanto")
    for weights in (quanto.qint8, quanto.qint4):
        model = copy.deepcopy(plain)
        quanto.quantize(model, weights=weights)
        quanto.freeze(model)
        assert linearize(model, tiny.prompt(6)).certify().passed
    model = copy.deepcopy(plain)
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    quanto.freeze(model)
    with pytest.raises(NotExactError, match="rounds its input"):
        linearize(model, tiny.prompt(6))


def test_no_library_is_imported_for_a_plain_model(plain):
    assert not quantised.is_quantised(plain.lm_head)
    assert not quantised.is_unreadable(plain.lm_head)
    assert quantised.dense_weight(plain.lm_head) is not None
    assert quantised.dense_weight(nn.LayerNorm(4)) is None
    assert "hqq" not in sys.modules
