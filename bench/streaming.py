"""A model that stays on disk beside the same model in memory: the same maps, at what time, in how little memory.

Writes a random Llama shard by shard into a temporary folder, reads it once so that the files are in the page cache, and
runs each way in a process of its own, whose peak is what the system says of it when it has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

import loclin
from harness import Row, arguments, report, say
from loclin.models.lease import layers_on_disk, on_disk
from loclin.spectral.few_sweeps import few_sweeps_svd

SIZES = {"quick": (1024, 2816, 10), "full": (1536, 4096, 40)}
"""d, the width of the MLP, and the number of layers: 0.5 and 4 GB in float32."""
VOCABULARY, HEADS, KV, LENGTH = 2000, 8, 2, 4
BUDGET = "300MB"
MOST_RESIDENT = 1.5e9
PARTS = ("linearize", "certify", "svd", "dense")
ROUNDS = 2  # of which each part's fastest counts: other processes slow it down


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run(*sys.argv[2:])
        return
    options = arguments(__doc__ or "")
    compare(options, "quick" if options.quick else "full")


def compare(options: argparse.Namespace, size: str) -> None:
    """Run both ways, and set them side by side."""
    with TemporaryDirectory(prefix="loclin-streaming-") as made:
        folder = Path(made)
        say(f"writing {write(folder, *SIZES[size]) / 1e9:.1f} GB into {folder}")
        for path in folder.glob("*.safetensors"):
            path.read_bytes()
        runs = [(way, in_process(way, folder)) for _ in range(ROUNDS) for way in ("memory", "stream")]
        found = {way: fastest([run for own, run in runs if own == way]) for way in ("memory", "stream")}
        ours, theirs = (load_file(folder / f"found-{way}.safetensors") for way in ("stream", "memory"))
    rows = []
    for name in ours:
        off = ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item()
        off = 0.0 if torch.equal(ours[name], theirs[name]) else off
        rows.append(Row(f"{name}: difference", off, "relative", "in memory", demand=1e-7))
    stream, memory = found["stream"], found["memory"]
    rows += [Row(part, stream[part], "s", "in memory", stream[part] / memory[part]) for part in ("load", *PARTS)]
    both = [sum(way[part] for part in PARTS) for way in (stream, memory)]
    rows.append(Row("all parts", both[0], "s", "in memory", both[0] / both[1], 1.3))
    rows.append(Row("peak resident", stream["peak"], "B", demand=MOST_RESIDENT))
    rows.append(Row("peak resident in memory", memory["peak"], "B"))
    for part, most in {"linearize": None, "certify": None, "svd": 5, "dense": 2}.items():
        rows.append(Row(f"{part}: sweeps over the layers", stream[f"{part} sweeps"], "sweeps", demand=most))
    report("streaming", rows, options.check)


def fastest(runs: list[dict[str, float]]) -> dict[str, float]:
    """The least seconds of each part, the fewest sweeps, and the largest peak."""
    return {name: (max if name == "peak" else min)(run[name] for run in runs) for name in runs[0]}


def write(folder: Path, d: int, inner: int, layers: int) -> int:
    """Write a random model, each layer in a file of its own; returns its size in bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=d,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    generator, kv = torch.Generator().manual_seed(0), d // HEADS * KV
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    own = {f"self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
    own |= {f"mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up")} | {"mlp.down_proj.weight": (d, inner)}
    own |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    ends = {"model.embed_tokens.weight": (VOCABULARY, d), "lm_head.weight": (VOCABULARY, d), "model.norm.weight": (d,)}
    parts = [{f"model.layers.{layer}.{name}": shape for name, shape in own.items()} for layer in range(layers)]
    places, size = {}, 0
    for number, part in enumerate([ends, *parts]):
        file = f"model-{number:05}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return size


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5


def in_process(way: str, folder: Path) -> dict[str, float]:
    """Run one way in a process of its own; its seconds, sweeps and peak."""
    command = [sys.executable, __file__, "--child", way, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    say(f"{way}: {found}")
    return found | {"peak": used.ru_maxrss * 1024}


def run(way: str, folder: str) -> None:
    """Run every part, print its seconds and sweeps, and leave what it found in the folder."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    model = loclin.load(folder, stream=way == "stream")
    found["load"] = time.perf_counter() - start
    held = [on_disk(layer) for layer in layers_on_disk(model.hf).values()]
    reader = held[0].reader if held and held[0] is not None else None
    whole = sum(p.numel() * p.element_size() for layer in model.hf.model.layers for p in layer.parameters())

    def measure(part: str, work: Callable[[], object]) -> object:
        before, start = getattr(reader, "bytes_read", 0), time.perf_counter()
        made = work()
        found[part] = time.perf_counter() - start
        found[f"{part} sweeps"] = (getattr(reader, "bytes_read", 0) - before) / whole
        return made

    ids = torch.arange(5, 5 + LENGTH)[None]
    lin = measure("linearize", lambda: loclin.linearize(model, ids, memory=BUDGET))
    J = lin.jacobian()
    certificate = measure("certify", lin.certify)
    assert certificate.passed
    svd = measure("svd", lambda: J.svd(8, joint=True))
    fresh = loclin.linearize(model, ids, memory=BUDGET).jacobian()  # the SVD may have made the dense map of the other
    dense = measure("dense", fresh.dense)
    # In memory another method is faster: beside that, the one for models on disk.
    own = way == "stream" and svd.method == "matrix_free"
    wide = svd if own else few_sweeps_svd(J, 8, align_to=J.value)
    kept = {"dense": dense, "svd, same method": wide.S, "svd": svd.S, "bias": J.bias}
    save_file({name: one.contiguous().clone() for name, one in kept.items()}, Path(folder) / f"found-{way}.safetensors")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
