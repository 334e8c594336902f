"""Loading by name: what each kind of name gives, and the one line each mistake gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from loclin.errors import MissingExtraError, ModelError, OptionError
from loclin.models import load

from .helpers import saved, tiny_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def half_directory(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("half"), tiny_llama().to(torch.float16))


def test_a_directory_gives_the_model_in_eval_mode(directory):
    model = load(str(directory))
    original = tiny_llama().state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.hf.state_dict().items())
    assert not model.hf.training
    assert model.info.source == "directory"
    assert model.encode("the cat", bos=True)[0, 0] == 1
    assert load(directory).info.family == "llama"  # a Path does too


@pytest.mark.parametrize(
    ("dtype", "used"),
    [
        ("float32", torch.float32),
        ("float64", torch.float64),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_as_asked_and_the_stored_one_is_remembered(half_directory, dtype, used):
    model = load(half_directory, dtype=dtype)
    assert {parameter.dtype for parameter in model.hf.parameters()} == {used}
    assert model.info.dtype == str(used).removeprefix("torch.")
    assert model.info.stored_dtype == "float16"


def test_float32_is_the_default(half_directory):
    assert load(half_directory).hf.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int8, torch.complex64])
def test_other_dtypes_are_refused_with_the_list(directory, dtype):
    with pytest.raises(OptionError, match="float32, float64, bfloat16, float16, auto"):
        load(directory, dtype=dtype)


@pytest.mark.parametrize("device", ["foo", "cpu:1", "meta", "cuda:9", ""])
def test_a_device_that_is_not_there_is_refused_before_loading(device):
    with pytest.raises(OptionError, match=r"choose one of cpu"):
        load("no/such/model", device=device)  # were the name looked at first, it would be the one refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(directory):
    with pytest.raises(OptionError, match=r"device='cuda': choose one of cpu$"):
        load(directory, device="cuda")


def test_the_processor_is_a_device(directory):
    assert load(directory, device="cpu").device == torch.device("cpu")


def test_device_map_passes_through(directory, tmp_path):
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    model = load(directory, device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path)
    assert model.hf.hf_device_map["model.layers"] == "disk"
    ids = model.encode("the cat")
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, load(directory).hf(ids).logits)


def test_device_and_device_map_exclude_each_other(directory):
    with pytest.raises(ModelError, match="give one of them"):
        load(directory, device="cpu", device_map="auto")


def test_device_map_without_accelerate_names_the_extra(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r'pip install "loclin\[accelerate\]"'):
        load(directory, device_map="auto")


def test_attention_implementation_passes_through(directory):
    assert load(directory, attn_implementation="eager").hf.config._attn_implementation == "eager"


def test_other_arguments_pass_through(directory):
    assert load(directory, max_position_embeddings=8).context_length == 8


@pytest.mark.parametrize("options", [{"use_kernels": True}, {"attn_implementation": "kernels-community/flash-attn"}])
def test_hub_kernels_are_refused(directory, options):
    with pytest.raises(ModelError, match="kernels"):
        load(directory, **options)


def test_an_attention_that_does_not_exist_is_one_line(directory):
    with pytest.raises(ModelError, match="foo") as caught:
        load(directory, attn_implementation="foo")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gives_near_ones_and_the_list():
    with pytest.raises(ModelError, match=r"did you mean gemma-3-270m\?.*gemma-3-270m, smollm2-135m"):
        load("gemma3-270")
    with pytest.raises(ModelError) as caught:
        load("qqq")
    assert "did you mean" not in str(caught.value)
    assert "gemma-3-270m, smollm2-135m" in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/no-such-directory"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"no directory"):
        load(name)


def test_a_missing_or_strange_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*x\.gguf"):
        load(tmp_path / "x.gguf")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a .gguf file"):
        load(tmp_path / "weights.bin")


def test_a_revision_is_for_hub_models_only(directory):
    with pytest.raises(ModelError, match="leave revision out"):
        load(directory, revision="main")


def test_a_directory_without_config_is_refused_and_its_gguf_is_pointed_at(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give .*x\.gguf"):
        load(tmp_path)


def test_a_broken_config_is_refused(tmp_path):
    (saved(tmp_path) / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read the config of"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_off_weights_are_refused(tmp_path, keep):
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off or damaged"):
        load(tmp_path)


def test_missing_weights_are_refused_and_not_made_up(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks weights.*model\.layers\.2\."):
        load(tmp_path)


def test_no_weights_at_all_is_one_line(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model of") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (
            BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
            "encoder",
        ),
        (
            T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
    ],
)
def test_encoders_are_refused_as_causal_models_from_their_config(tmp_path, model, word):
    model.config.save_pretrained(tmp_path)  # no weights there: they cannot have been read
    with pytest.raises(ModelError, match=rf"is an {word}"):
        load(tmp_path, task="causal")


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_the_stored_class_gives_the_task(tmp_path, kind):
    stored = kind(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    stored.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.task, type(model.hf)) == ("masked" if kind is BertForMaskedLM else "classification", kind)
    with pytest.raises(OptionError, match="stream is for causal"):
        load(tmp_path, stream=True)
    with pytest.raises(OptionError, match="choose one of causal"):
        load(tmp_path, task="sideways")


def test_a_gguf_file_holds_a_causal_model(tmp_path):
    with pytest.raises(ModelError, match="leave the task out"):
        load(tmp_path / "model.gguf", task="masked")


def test_a_family_without_a_causal_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="no causal language model for the family 'vit'"):
        load(tmp_path)


def test_no_tokenizer_files_is_no_tokenizer(tmp_path):
    model = load(saved(tmp_path, tokenizer=False))
    assert model.tokenizer is None
    assert model.bos is None


def test_a_broken_tokenizer_is_refused(tmp_path):
    (saved(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of"):
        load(tmp_path)


def test_the_librarys_own_settings_are_put_back(directory):
    transformers_logging.set_verbosity_info()
    try:
        load(directory)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()


def test_loading_prints_nothing(directory, capfd):
    load(directory)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ruling", [True, False, None])
def test_the_hubs_own_switch_for_bars_is_respected_and_restored(directory, monkeypatch, ruling):
    from huggingface_hub.utils import tqdm as bars

    module = sys.modules[bars.__module__]
    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", ruling)
    monkeypatch.setattr(module, "progress_bar_states", {})
    before = are_progress_bars_disabled()
    load(directory)
    assert are_progress_bars_disabled() == before


# The hub


def hub_fault(kind: type[Exception]):
    def answer(*_args, **_kwargs):
        raise kind.__new__(kind, "x") if kind is not ConnectionError else ConnectionError("no network")

    return answer


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, "gated: accept its terms .* log in"),
        (RepositoryNotFoundError, "has no model org/name, or it is private"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (ConnectionError, r"cannot be reached .* local directory or a \.gguf file"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, tmp_path, kind, words):
    monkeypatch.setattr(huggingface_hub, "model_info", hub_fault(kind))
    with pytest.raises(ModelError, match=words) as caught:
        load("org/name", revision="v9", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_hub_id_is_said(tmp_path):
    with pytest.raises(ModelError, match="is not a hub id"):
        load("org/na me", cache_dir=tmp_path)


@pytest.mark.long
def test_a_downloaded_copy_is_used_without_the_hub(monkeypatch, tmp_path, directory):
    monkeypatch.setattr(huggingface_hub, "model_info", hub_fault(ConnectionError))
    commit = "0123456789012345678901234567890123456789"
    home = tmp_path / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(directory)
    model = load("org/name", cache_dir=tmp_path)
    assert model.info.source == "hub"
    assert model.info.name == "org/name"
    assert model.info.revision == commit
    assert model.info.stored_dtype == "float32"
    assert model.encode("the cat", bos=True)[0, 0] == 1
    streamed = load("org/name", cache_dir=tmp_path, stream=True)
    ids = model.encode("the cat")
    with torch.no_grad():
        assert torch.equal(streamed.hf(ids).logits, model.hf(ids).logits)
    assert streamed.info == model.info
