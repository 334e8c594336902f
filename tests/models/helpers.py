"""Tiny models and files that run the real code paths in a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIALS = ["<unk>", "<s>", "</s>"]
LETTERS = list(bytes_to_unicode().values())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
VOCABULARY = [*SPECIALS, *LETTERS, *("".join(pair) for pair in MERGES)]
SRC = Path(__file__).parents[2] / "src"


def tiny_llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes}))


def tiny_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in names.items() if v})


def saved(path: Path, model: PreTrainedModel | None = None, *, tokenizer: bool = True) -> Path:
    (model or tiny_llama()).save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def tiny_gguf(path: Path, *, seed: int = 0, architecture: str = "llama") -> Path:
    """Write a two-layer Llama, or Qwen 2 with its biases, of 8-bit blocks, a tied head and a byte-level vocabulary."""
    rng = np.random.default_rng(seed)
    d, ffn, layers, heads, kv_heads = 32, 64, 2, 4, 2
    out = gguf.GGUFWriter(path, architecture)
    out.add_name("tiny")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    out.add_context_length(16)
    out.add_embedding_length(d)
    out.add_block_count(layers)
    out.add_feed_forward_length(ffn)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(d // heads)
    out.add_vocab_size(len(VOCABULARY))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(VOCABULARY)
    out.add_token_types([3] * len(SPECIALS) + [1] * (len(VOCABULARY) - len(SPECIALS)))
    out.add_token_merges([" ".join(pair) for pair in MERGES])
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    q8 = gguf.GGMLQuantizationType.Q8_0

    def blocks(name: str, *shape: int) -> None:
        values = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        out.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)

    def gain(name: str) -> None:
        out.add_tensor(name, (1 + 0.1 * rng.standard_normal(d)).astype(np.float32))

    blocks("token_embd.weight", len(VOCABULARY), d)
    gain("output_norm.weight")
    for i in range(layers):
        gain(f"blk.{i}.attn_norm.weight")
        gain(f"blk.{i}.ffn_norm.weight")
        blocks(f"blk.{i}.attn_q.weight", d, d)
        blocks(f"blk.{i}.attn_k.weight", d * kv_heads // heads, d)
        blocks(f"blk.{i}.attn_v.weight", d * kv_heads // heads, d)
        blocks(f"blk.{i}.attn_output.weight", d, d)
        if architecture == "qwen2":
            for part, width in (("q", d), ("k", d * kv_heads // heads), ("v", d * kv_heads // heads)):
                out.add_tensor(f"blk.{i}.attn_{part}.bias", rng.standard_normal(width).astype(np.float32))
        blocks(f"blk.{i}.ffn_gate.weight", ffn, d)
        blocks(f"blk.{i}.ffn_up.weight", ffn, d)
        blocks(f"blk.{i}.ffn_down.weight", d, ffn)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def start(code: str, cache: Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Run code in a process of its own that uses the given cache."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "LOCLIN_CACHE": str(cache), "PYTHONPATH": str(SRC)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
