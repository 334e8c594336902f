"""The models that come as packages: found, verified, and right."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loclin.errors import ModelError
from loclin.models import load
from loclin.models.gguf import cache
from loclin.models.gguf.packaged import DEFAULT, PACKAGED, PackagedModel

from .helpers import SRC, tiny_gguf


@pytest.fixture
def package(tmp_path, monkeypatch) -> PackagedModel:
    """An installed data package in two parts, whose import would fail."""
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    data = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    for name, part in (("tiny_part1", data[:9000]), ("tiny_part2", data[9000:])):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / name / "data" / "part").write_bytes(part)
    model = PackagedModel(
        name="tiny",
        file_name="whole.gguf",
        parts=(("tiny_part1", "data/part"), ("tiny_part2", "data/part")),
        sha256=hashlib.sha256(data).hexdigest(),
        pip="install tiny-model",
        bos="</s>",
        description="two layers",
    )
    monkeypatch.setitem(PACKAGED, "tiny", model)
    return model


def break_the_package(tmp_path: Path) -> None:
    part = tmp_path / "tiny_part2" / "data" / "part"
    part.write_bytes(part.read_bytes()[:-1] + b"?")


def test_parts_are_joined_without_importing_anything(package):
    model = load("tiny")
    assert (model.info.source, model.info.name, model.info.sha256) == ("package", "tiny", package.sha256)
    assert not {"tiny_part1", "tiny_part2"} & sys.modules.keys()


@pytest.mark.usefixtures("package")
def test_the_registry_names_the_beginning_token():
    model = load("tiny")
    assert model.tokenizer.bos_token == "<s>"
    assert model.bos == model.tokenizer.convert_tokens_to_ids("</s>")
    assert model.encode("a", bos=True)[0, 0] == model.bos


def test_a_wrong_hash_is_refused_before_conversion(package, tmp_path, monkeypatch):
    break_the_package(tmp_path)
    monkeypatch.setattr(cache, "convert", lambda *_: pytest.fail("converted"))
    with pytest.raises(
        ModelError, match=r"whole\.gguf has other .*SHA-256 .*expected .*pip install tiny-model"
    ) as caught:
        load("tiny")
    assert package.sha256[:12] in str(caught.value)
    assert package.sha256[:13] not in str(caught.value)
    assert cache.entries() == []


def test_a_missing_package_names_its_command(package, monkeypatch):
    monkeypatch.setitem(PACKAGED, "tiny", replace(package, parts=(("no_such_package", "x"),), extra="demo"))
    assert not PACKAGED["tiny"].installed
    with pytest.raises(ModelError, match=r'tiny is not installed: pip install tiny-model \(or "loclin\[demo\]"\)'):
        load("tiny")


def test_a_sound_copy_needs_no_package(package, monkeypatch):
    load("tiny")
    monkeypatch.setitem(PACKAGED, "tiny", replace(package, parts=(("no_such_package", "x"),)))
    assert load("tiny").info.name == "tiny"


def test_an_altered_copy_without_the_package_says_how_to_mend_it(package, monkeypatch):
    load("tiny")
    (entry,) = cache.entries()
    weights = entry.path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setitem(PACKAGED, "tiny", replace(package, parts=(("no_such_package", "x"),)))
    with pytest.raises(ModelError, match=rf"damaged \(model\.safetensors\).*models remove {entry.key}.*tiny-model"):
        load("tiny")


def test_the_default_is_packaged():
    assert DEFAULT in PACKAGED
    assert all(model.name == name for name, model in PACKAGED.items())


# The real ones


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "family", "stored"),
    [
        ("gemma-3-270m", "gemma3_text", "Q4_K_M gguf"),
        ("smollm2-135m", "llama", "Q4_1 gguf"),
    ],
)
def test_a_real_model_is_right(name, family, stored):
    model = load(name)
    assert (model.info.family, model.info.stored_dtype, model.info.dtype) == (family, stored, "float32")
    assert model.info.sha256 == PACKAGED[name].sha256
    assert model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    assert not hasattr(model.hf.config, "quantization_config")
    assert model.tokenizer.convert_ids_to_tokens(model.bos) == PACKAGED[name].bos
    for bos in (None, True):
        with torch.no_grad():
            best = model.hf(model.encode("The Golden Gate", bos=bos)).logits[0, -1].argmax()
        assert model.tokenizer.decode(best) == " Bridge"
    ids = model.encode("The Golden Gate", bos=True)[0].tolist()
    assert ids.count(model.bos) == 1
    assert ids[0] == model.bos


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_real_copy_is_bitwise_the_file(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load(name)
    source = PACKAGED[name].source()
    gguf = source.place(tmp_path)
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == PACKAGED[name].sha256
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    state = original.state_dict()
    assert state.keys() == model.hf.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.hf.state_dict().items())
    ids = model.encode("The bridge out of Marin is the")
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, original(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.name)
    for text in (
        "The Golden Gate",
        "  Ünïcödé ✓ 日本語\n\n1234567",
        "def f(x):\n\treturn x",
        "<bos>a<|im_end|>b",
    ):
        assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert model.tokenizer.special_tokens_map == tokenizer.special_tokens_map


TIMED = """
import time
start = time.perf_counter()
from loclin import load
from loclin.models.gguf import cache, manifest
from loclin.models.gguf.packaged import PACKAGED
imported = time.perf_counter()
model = load({name!r})
loaded = time.perf_counter()
path = cache.place(PACKAGED[{name!r}].source())
faults = manifest.read(path).faults(path)
checked = time.perf_counter()
print(f"{name}: import {{imported - start:.1f}} s, load with verification {{loaded - imported:.1f}} s "
      f"(verification alone {{checked - loaded:.1f}} s), faults {{faults}}")
"""


@pytest.mark.real
@pytest.mark.long_for("gemma-3-270m")
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_real_reload_is_timed_and_clean(name, capsys):
    load(name)  # converted by now
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TIMED.format(name=name)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "faults []" in done.stdout
    with capsys.disabled():
        print("\n" + done.stdout.strip())
