"""Checkpoints with quantised weights: exact for the dequantised weights, or refused by name."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from typer.testing import CliRunner

import loclin
import tiny
from loclin.cli import app
from loclin.errors import ModelError
from loclin.linearization import linearize
from loclin.models import quantisation
from loclin.models import tiny as families

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 8


def pack(numbers, bits):
    """Rows of integers as int32, number by number in Python: the first is in the lowest bits."""
    words = []
    for row in numbers.tolist():
        per = 32 // bits
        chunks = [row[i : i + per] for i in range(0, len(row), per)]
        words.append([sum(number << (bits * place) for place, number in enumerate(chunk)) for chunk in chunks])
    return (torch.tensor(words, dtype=torch.int64) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def gptq(path, weight, bits, layout="gptq", acts=False):
    """(the stored tensors of a weight, the weight that they stand for), one number at a time."""
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // GROUP
    if acts:
        groups = groups[torch.randperm(inputs)]
    most = 2**bits - 1
    q = torch.randint(0, most + 1, (inputs, outputs))
    zeros = torch.randint(0, most + 1, (inputs // GROUP, outputs))
    scales = (0.02 * torch.rand(inputs // GROUP, outputs) + 0.001).half()
    stored = (zeros - 1) & most if layout == "gptq" else zeros
    parts = {"qweight": pack(q.T, bits).T, "qzeros": pack(stored, bits), "scales": scales, "g_idx": groups.int()}
    value = torch.empty(outputs, inputs)
    for o, i in product(range(outputs), range(inputs)):
        value[o, i] = float(scales[groups[i], o]) * int(q[i, o] - zeros[groups[i], o])
    return {f"{path}.{name}": part.contiguous() for name, part in parts.items()}, value


def awq(path, weight, bits):
    """The same for AWQ, whose words hold eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    outputs, inputs = weight.shape
    q, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(0, 16, (inputs // GROUP, outputs))
    scales = (0.02 * torch.rand(inputs // GROUP, outputs) + 0.001).half()
    order = [block * 8 + place for block in range(outputs // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    parts = {"qweight": pack(q[:, order], bits), "qzeros": pack(zeros[:, order], bits), "scales": scales}
    value = torch.empty(outputs, inputs)
    for o, i in product(range(outputs), range(inputs)):
        value[o, i] = float(scales[i // GROUP, o]) * int(q[i, o] - zeros[i // GROUP, o])
    return {f"{path}.{name}": part for name, part in parts.items()}, value


def hqq(path, weight, bits, axis=1, view=torch.uint8):
    """The same for HQQ, which reshapes a weight so that a group is a row (axis 1) or a column (axis 0)."""
    shape = (-1, GROUP) if axis == 1 else (GROUP, -1)
    q = torch.randint(0, 2**bits, weight.shape).reshape(shape)
    rows, columns = q.shape
    groups = (rows, 1) if axis == 1 else (1, columns)
    zeros, scales = ((2**bits - 1) * torch.rand(groups)).half(), (0.02 * torch.rand(groups) + 0.001).half()
    many, name, word = (10, "3bit_32", torch.int32) if bits == 3 else (8 // bits, f"{bits}bit_u8", torch.uint8)
    words = [[0] * columns for _ in range(-(-rows // many))]
    for r, numbers in enumerate(q.tolist()):
        part, row = divmod(r, len(words))
        words[row] = [
            held | number << bits * (many - 1 - part) for held, number in zip(words[row], numbers, strict=True)
        ]
    value = (q.float() - zeros.float()) * scales.float()
    view = view if word == torch.uint8 else word
    parts = {"W_q": torch.tensor(words, dtype=word).view(view), "scale": scales, "zero": zeros}
    parts["shape"] = torch.tensor(weight.shape)
    texts = {"packing": name, "compute_dtype": "torch.float16", "unpack_view_dtype": str(word)}
    parts |= {key: torch.tensor([*text.encode()], dtype=torch.uint8) for key, text in texts.items()}
    integers = {"nbits": bits, "group_size": GROUP, "axis": axis}
    parts |= {key: torch.tensor(number, dtype=torch.int32) for key, number in integers.items()}
    switches = {"channel_wise", "encoded_state_dict", "optimize", "stores_quant_config"}
    others = {"offload_meta", "quant_scale", "quant_zero", "round_zero", "view_as_float"}
    parts |= {key: torch.tensor(key in switches, dtype=torch.uint8) for key in switches | others}
    return {f"{path}.{key}": part.contiguous() for key, part in parts.items()}, value.reshape(weight.shape)


def fp8(path, weight, block=(8, 16)):
    """Fine-grained FP8: blocks of e4m3 numbers, each with a scale."""
    rows, columns = weight.shape
    scales = 0.5 + torch.rand(rows // block[0], columns // block[1])
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return {f"{path}.weight": stored, f"{path}.weight_scale_inv": scales}, stored.float() * spread


@pytest.fixture(scope="module")
def plain():
    """All sizes are multiples of 16; Qwen2 has biases, on Q, K and V."""
    config = Qwen2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return tiny._shaken(Qwen2ForCausalLM(config), 0, torch.float32)


def write(folder, plain, settings, store):
    """Write a model's checkpoint with its linear layers quantised by `store`; returns the weights they stand for."""
    plain.save_pretrained(folder)
    torch.manual_seed(1)
    tensors, values = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        path = key.removesuffix(".weight")
        if path.endswith(LINEAR) and key.endswith(".weight"):
            parts, values[key] = store(path, tensor)
            tensors |= parts
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, settings)
    return values


def configure(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
STORED = {
    "gptq, 4 bits": (GPTQ, lambda path, weight: gptq(path, weight, 4)),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, lambda path, weight: gptq(path, weight, 2)),
    "gptq, any order": (GPTQ | {"bits": 8}, lambda path, weight: gptq(path, weight, 8, acts=True)),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda path, weight: gptq(path, weight, 4, "gptq_v2")),
    "awq": (AWQ, lambda path, weight: awq(path, weight, 4)),
    "hqq, 8 bits": (HQQ, lambda path, weight: hqq(path, weight, 8)),
    "hqq, 4 bits as half": (HQQ, lambda path, weight: hqq(path, weight, 4, view=torch.float16)),
    "hqq, 3 bits": (HQQ, lambda path, weight: hqq(path, weight, 3)),
    "hqq, 2 bits in columns": (HQQ, lambda path, weight: hqq(path, weight, 2, axis=0)),
    "hqq, 1 bit": (HQQ, lambda path, weight: hqq(path, weight, 1)),
    "fp8": (FP8, fp8),
}


@pytest.mark.parametrize("kind", STORED)
def test_the_map_is_that_of_the_dequantised_weights(kind, plain, tmp_path):
    settings, store = STORED[kind]
    values = write(tmp_path, plain, settings, store)
    model = loclin.load(tmp_path, dtype="float32")
    for key, value in values.items():
        torch.testing.assert_close(model.hf.get_parameter(key).detach(), value, rtol=0, atol=0)
    lin = linearize(model, tiny.prompt(6))
    assert lin.certify().passed
    assert model.info.stored_dtype == settings["quant_method"]
    assert any("also round the inputs" in warning for warning in lin.warnings) == (kind == "fp8")


def test_mxfp4(tmp_path):
    """gpt-oss: two e2m1 numbers in a byte, and a power of two for each 32 of them."""
    config = copy.deepcopy(families.build("gpt_oss").config)
    config.hidden_size = config.intermediate_size = 32
    tiny._shaken(GptOssForCausalLM(config), 0, torch.float32).save_pretrained(tmp_path)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-number for number in table]
    torch.manual_seed(2)
    tensors, values = {}, {}
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
        exponents = torch.randint(118, 124, (experts, outputs, inputs // 32))
        tensors[f"{key}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{key}_scales"] = exponents.to(torch.uint8)
        numbers = torch.tensor(table)[codes] * 2.0 ** (exponents[..., None] - 127)
        values[key] = numbers.flatten(2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]})
    loaded = loclin.load(tmp_path, dtype="float32")
    for key, value in values.items():
        torch.testing.assert_close(loaded.hf.get_parameter(key).detach(), value, rtol=0, atol=0)
    assert linearize(loaded, tiny.prompt(6)).certify().passed


def test_compressed_tensors(plain, tmp_path):
    """Eight bits by compressed-tensors' own compressor."""
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }

    def store(path, weight):
        scales = 0.01 + 0.01 * torch.rand(len(weight), 1)
        q = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        return {f"{path}.weight": q, f"{path}.weight_scale": scales}, q.float() * scales

    values = write(tmp_path, plain, settings, store)
    model = loclin.load(tmp_path, dtype="float32")
    for key, value in values.items():
        torch.testing.assert_close(model.hf.get_parameter(key).detach(), value, rtol=1e-6, atol=0)
    assert linearize(model, tiny.prompt(6)).certify().passed


def refusal(folder, plain, settings):
    """What `load` says of a checkpoint whose config has these settings."""
    plain.save_pretrained(folder)
    configure(folder, settings)
    with pytest.raises(ModelError) as caught:
        loclin.load(folder)
    return str(caught.value)


W8A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
}
ROUNDING = [{"quant_method": "bitnet"}, {"quant_method": "fbgemm_fp8"}, FP8 | {"activation_scheme": "static"}, W8A8]


@pytest.mark.parametrize("settings", ROUNDING)
def test_rounded_inputs_are_refused(settings, plain, tmp_path):
    message = refusal(tmp_path, plain, settings)
    assert f"is quantised by {settings['quant_method']} and rounds the inputs of its layers" in message
    assert ("dequantize=True" in message) == (settings["quant_method"] in ("fp8", "compressed-tensors"))


UNPACKED = {"awq", "fp8", "gptq", "hqq", "mxfp4", "mxfp8"}  # these need no library


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - UNPACKED))
def test_every_method_is_read_or_refused_by_name(method, monkeypatch, plain, tmp_path):
    """Without any library; no method ends in a failure of transformers."""
    monkeypatch.setattr(quantisation, "installed", lambda _module: False)
    name = method.removesuffix("_4bit").removesuffix("_8bit")
    settings = {"quant_method": name, "bits": 4, "load_in_4bit": name == "bitsandbytes"}
    message = refusal(tmp_path, plain, settings)
    assert f"quantised by {name}" in message
    assert "pip install" in message or "which loclin does not read" in message or "rounds the inputs" in message


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("awq", "model.layers.1.mlp.up_proj.scales"),
        ("awq", "model.layers.0.self_attn.q_proj.qzeros"),
        ("hqq, 1 bit", "model.layers.1.mlp.up_proj.zero"),
        ("hqq, 1 bit", "model.layers.0.self_attn.q_proj.packing"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_part_is_named(kind, lost, stream, plain, tmp_path):
    write(tmp_path, plain, *STORED[kind])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks {lost}, without which".replace(".", r"\.")):
        loclin.load(tmp_path, stream=stream)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("packing", torch.tensor([*b"4bit_i32"], dtype=torch.uint8), "packed by hqq as '4bit_i32', which is not read"),
        ("scale", torch.ones(5, 1), r"scales \[5, 1\] and zeros \[192, 1\], which do not fit together"),
        ("shape", torch.tensor([48, 24]), r"up_proj \[48, 24\] has \[24, 8\] words packed as 1bit_u8"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_hqq_that_do_not_fit_together(part, value, said, stream, plain, tmp_path):
    write(tmp_path, plain, *STORED["hqq, 1 bit"])
    tensors = load_file(tmp_path / "model.safetensors") | {f"model.layers.1.mlp.up_proj.{part}": value}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=said if not stream or part != "shape" else r"has the shape \[48, 24\]"):
        loclin.load(tmp_path, stream=stream)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (GPTQ | {"bits": 3}, "gptq with 3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        (AWQ | {"version": "gemv"}, "layout 'gemv'"),
    ],
)
def test_another_layout_is_refused(settings, named, plain, tmp_path):
    assert named in refusal(tmp_path, plain, settings)


def test_groups_that_the_config_does_not_name(plain, tmp_path):
    settings, store = STORED["awq"]
    write(tmp_path, plain, settings | {"group_size": 4}, store)
    with pytest.raises(ModelError, match=r"_proj has \d groups of \d+ inputs, and its config says 4 for each"):
        loclin.load(tmp_path)


def test_a_file_that_is_cut_off(plain, tmp_path):
    write(tmp_path, plain, *STORED["gptq_v2"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut off or damaged"):
        loclin.load(tmp_path)


def test_the_command_line_names_the_library(monkeypatch, plain, tmp_path):
    monkeypatch.setattr(quantisation, "installed", lambda _module: False)
    plain.save_pretrained(tmp_path)
    configure(tmp_path, {"quant_method": "torchao", "quant_type": "int8_weight_only"})
    result = CliRunner().invoke(app, ["explain", "a", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install torchao" in result.output.replace("\n", " ")


@pytest.mark.parametrize("kind", STORED)
def test_layers_that_stay_on_disk(kind, plain, tmp_path):
    write(tmp_path, plain, *STORED[kind])
    whole, streamed = (linearize(loclin.load(tmp_path, stream=on), tiny.prompt(6)) for on in (False, True))
    assert streamed.model.streamed
    assert torch.equal(streamed.jacobian().dense(), whole.jacobian().dense())
    assert streamed.warnings == whole.warnings
