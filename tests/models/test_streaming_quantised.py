"""Quantised layers that stay on disk: the map is that of the dequantised weights, which the tests compute, too."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import loclin
import tiny
from loclin.cli import app
from loclin.errors import ModelError
from loclin.models.lease import layers_on_disk, named_weights

IDS = tiny.prompt(6)
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers of four bits e2m1, by their code."""


def moe(family, **sizes):
    config = AutoConfig.for_model(family, num_experts_per_tok=2, num_local_experts=4, **{**tiny._SIZES, **sizes})
    return tiny._shaken(AutoModelForCausalLM.from_config(config), 0, torch.float32)


def write(path, model, settings, pack):
    """Save a model with its packed layers' weights by `pack`, a function from name and weight to packed tensors and
    the dequantised weight; give the model these weights, and its directory in plain form, too.
    """
    quantised, plain = path / "quantised", path / "plain"
    model.save_pretrained(quantised)
    file = quantised / "model.safetensors"
    stored, dequantised = {}, {}
    for name, weight in load_file(file).items():
        packed = pack(name, weight) if ".layers." in name and weight.dim() > 1 else None
        parts, dequantised[name] = ({name: weight}, weight) if packed is None else packed
        stored |= parts
    save_file(stored, file, metadata={"format": "pt"})
    model.save_pretrained(plain)
    save_file(dequantised, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return quantised, plain


def pack_fp8(block, exponents=False):
    """Blocks of e4m3 numbers, each with a scale: a float32, or the exponent of a power of two."""

    def pack(name, weight):
        if not name.endswith(".weight") or "norm" in name:
            return None
        out, inside = weight.shape
        rows, columns = block or weight.shape
        scales = torch.zeros(-(-out // rows), -(-inside // columns))
        codes, dequantised = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale = weight[here].abs().max() / 448
                scales[i, j] = 2.0 ** scale.log2().ceil() if exponents else scale
                codes[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
                dequantised[here] = codes[here].float() * scales[i, j]
        kept = (scales.log2() + 127).to(torch.uint8) if exponents else scales if block else scales[0, 0].clone()
        return {name: codes, f"{name}_scale_inv": kept}, dequantised

    return pack


def pack_mxfp4(name, weight):
    """Experts `[experts, in, out]` as bytes `[experts, out, groups, 16]`, and an exponent for each group of 32."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, groups, 32]
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    codes = (groups / 2 ** exponents[..., None] - FP4[:, None, None, None, None]).abs().argmin(0).to(torch.uint8)
    dequantised = (FP4[codes.long()] * 2 ** exponents[..., None]).flatten(2).transpose(1, 2).contiguous()
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}, dequantised


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
KINDS = {
    "fp8": (lambda: tiny.llama(dtype=torch.float32), FP8 | {"weight_block_size": [16, 16]}, pack_fp8((16, 16))),
    "fp8, one scale": (lambda: tiny.llama(dtype=torch.float32), FP8, pack_fp8(None)),
    "fp8, experts": (lambda: moe("mixtral"), FP8 | {"weight_block_size": [16, 16]}, pack_fp8((16, 16))),
    "mxfp8": (
        lambda: tiny.llama(dtype=torch.float32),
        {"quant_method": "mxfp8", "weight_block_size": [1, 8]},
        pack_fp8((1, 8), exponents=True),
    ),
    "mxfp4": (
        lambda: moe("gpt_oss", hidden_size=64, intermediate_size=32, head_dim=16),
        {"quant_method": "mxfp4"},
        pack_mxfp4,
    ),
}


def alike(streamed, plain):
    """Compare a model whose layers are on disk with one of the same weights: these, bit for bit, and the maps.

    Products add in another order where memory is aligned differently, and plain weights are as in their file.
    """
    assert layers_on_disk(streamed.hf)
    ours, theirs = dict(named_weights(streamed.hf)), dict(named_weights(plain.hf))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    here, there = (loclin.linearize(model, IDS) for model in (streamed, plain))
    same(here, there)
    assert here.certify().passed


def same(here, there):
    J, K = here.jacobian().dense(), there.jacobian().dense()
    assert (J - K).norm() <= tiny.rounding() * K.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_weights_are_the_dequantised_ones(kind, tmp_path):
    build, settings, pack = KINDS[kind]
    quantised, plain = write(tmp_path, build(), settings, pack)
    alike(loclin.load(quantised, stream=True), loclin.load(plain, stream=True))


def test_they_are_rounded_to_the_dtype_that_was_asked_for(tmp_path):
    build, settings, pack = KINDS["fp8"]
    quantised, plain = write(tmp_path, build(), settings, pack)
    alike(*(loclin.load(folder, stream=True, dtype="bfloat16") for folder in (quantised, plain)))


@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.weight_scale_inv", "layers.1.mlp.up_proj.weight"])
def test_a_missing_scale_or_weight_is_named(part, tmp_path):
    build, settings, pack = KINDS["fp8"]
    folder, _ = write(tmp_path, build(), settings, pack)
    lose(folder, f"model.{part}")
    with pytest.raises(ModelError, match=rf"lacks .*{part}"):
        loclin.load(folder, stream=True)


def lose(folder, name):
    file = folder / "model.safetensors"
    stored = load_file(file)
    del stored[name]
    save_file(stored, file, metadata={"format": "pt"})


def test_a_tensor_that_the_method_does_not_know_is_named(tmp_path):
    build, settings, pack = KINDS["fp8"]
    folder, _ = write(tmp_path, build(), settings, pack)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(24, dtype=torch.uint8)}, file)
    with pytest.raises(ModelError, match=r"stores model\.norm\.weight as uint8, which fp8 gives no meaning"):
        loclin.load(folder, stream=True)


def test_scales_of_other_blocks_are_refused(tmp_path):
    build, settings, pack = KINDS["fp8"]
    folder, _ = write(tmp_path, build(), settings | {"weight_block_size": [128, 128]}, pack)
    with pytest.raises(ModelError, match=r"has the scales \[.*blocks of \[128, 128\]"):
        loclin.load(folder, stream=True)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """Checkpoints of bitsandbytes: NF4 with quantised scales, and FP4 with plain ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        folder = tmp_path_factory.mktemp("four_bits")
        tiny.llama(dtype=torch.float32).save_pretrained(folder / "stock")
        for kind, nested in (("nf4", True), ("fp4", False)):
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
            model = AutoModelForCausalLM.from_pretrained(folder / "stock", quantization_config=how)
            model.save_pretrained(folder / kind)
    return folder


def unpack_four_bit(stored, name):
    """A weight by the definition of the format: a code book, times the scale of each block."""
    (key,) = (key for key in stored if key.startswith(f"{name}.quant_state."))
    state = json.loads(bytes(stored[key].numpy()))
    scales = stored[f"{name}.absmax"]
    if "nested_blocksize" in state:
        coarse = stored[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = stored[f"{name}.nested_quant_map"][scales.long()] * coarse + state["nested_offset"]
    packed = stored[name].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scales = scales.repeat_interleave(state["blocksize"])[: len(codes)]
    return (stored[f"{name}.quant_map"][codes] * scales).view(state["shape"])


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_streamed_four_bits_are_the_dequantised_weights(kind, four_bits, tmp_path):
    stored = load_file(four_bits / kind / "model.safetensors")
    packed = {name for name, tensor in stored.items() if tensor.dtype == torch.uint8 and name.endswith(".weight")}
    assert len(packed) == 3 * 7
    plain = load_file(four_bits / "stock" / "model.safetensors")
    streamed = loclin.load(four_bits / kind, stream=True)
    weights = dict(named_weights(streamed.hf))
    for name in packed:
        torch.testing.assert_close(weights[name], unpack_four_bit(stored, name), rtol=1e-6, atol=0)
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path)
    save_file(
        plain | {name: weights[name].contiguous() for name in packed},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    alike(streamed, loclin.load(tmp_path, stream=True))
    same(*(loclin.linearize(model, IDS) for model in (streamed, loclin.load(four_bits / kind))))


@pytest.mark.parametrize("part", ["absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"])
def test_a_missing_part_of_four_bits_is_named(part, four_bits, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in (four_bits / "nf4").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = f"model.layers.2.self_attn.o_proj.weight.{part}"
    lose(folder, name)
    with pytest.raises(ModelError, match=f"lacks {name}, without which"):
        loclin.load(folder, stream=True)


def test_a_missing_library_is_one_line_with_the_pip_command(four_bits, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    run = CliRunner().invoke(app, ["explain", "The", "--model", str(four_bits / "nf4"), "--stream"])
    assert run.exit_code == 2
    assert "pip install bitsandbytes" in " ".join(run.output.split())


@pytest.mark.parametrize("own", [{"quant_method": "torchao"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
def test_other_methods_are_refused_by_name(own, tmp_path):
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(ModelError, match=rf"quantised \({own['quant_method']}\).* without stream"):
        loclin.load(tmp_path, stream=True)
