"""GGUF files that cannot be used: each is one line, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loclin.errors import MissingExtraError, ModelError
from loclin.models import load
from loclin.models.gguf import cache
from loclin.models.gguf.header import read_header

from .helpers import VOCABULARY, tiny_gguf


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_header_says_how_the_weights_are_stored_and_how_many_there_are(tmp_path):
    header = read_header(tiny_gguf(tmp_path / "tiny.gguf"))
    assert (header.architecture, header.stored_dtype) == ("llama", "Q8_0 gguf")
    assert header.n_elements == 32 * len(VOCABULARY) + 5 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 300, 5000, -1])
def test_a_cut_off_file_is_one_line(tmp_path, keep):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf is (cut off or damaged|not a GGUF file)") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert cache.entries() == []


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF" + b"\xff" * 100, b"GGUF" + b"\0" * 100])
def test_what_is_no_gguf_file_is_one_line(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf is") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_an_architecture_transformers_does_not_read_is_one_line(home, tmp_path):
    path = tiny_gguf(tmp_path / "x.gguf", architecture="wavtokenizer-dec")
    with pytest.raises(ModelError, match=r"cannot read x\.gguf \(wavtokenizer-dec GGUF\)") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize(("module", "extra"), [("gguf", "gguf"), ("accelerate", "accelerate")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, module, extra):
    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "loclin\[{extra}\]"'):
        load(path)


def test_a_qwen2_with_biases_is_affine_and_says_how_much_of_it_is_bias(tmp_path):
    from loclin import linearize

    model = load(tiny_gguf(tmp_path / "tiny.gguf", architecture="qwen2"))
    assert model.info.family == "qwen2"
    certificate = linearize(model, "the other the").certify()
    assert certificate.passed
    assert certificate.reconstruction_error < 1e-5
    assert certificate.bias_share > 0.01
    named = linearize(model, "the other the").jacobian().bias_by_source()
    assert set(named) == {f"model.layers.{layer}.self_attn.v_proj.bias" for layer in range(2)}
