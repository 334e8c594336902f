"""The engine on a GPU: dense maps, all layers, SVDs and attribution of random models of usual shapes.

Each is timed beside the card's own rate for one large product, and beside `torch.func.jacrev` of the same frozen
forward pass. Weights are random, made on the device, and exact in bfloat16. Columns: 2 d T P flops (P: the V, O, up and
down weights) at the card's float32 rate, of which a dense map at 8 tokens should reach 60 %.

The results are in `bench/results/gpu-CARD.json`, which is written after every part: a run that is cut off leaves what
it has. `--seconds` is for the whole run: a part that would begin later is left out, and named. `--cpu --quick` runs the
same code on the processor, with tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loclin
from harness import Row, matmul_rate, report, say, timed, wait_for, write
from loclin.freeze.options import Precision
from loclin.linearization import Linearization
from loclin.maps.layer_maps import COMPONENTS, layer_maps
from models import CountedMap, linear_weights, whole_graph

_SHARE, _LAYERS, _JACREV, _SPLIT, _CERTIFICATE = 0.6, 3.0, 5.0, 3.0, 1e-6
_MEMORY = 0.4  # of what is free beside the weights
_COLUMNS, _K = 256, 8
_SIDE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class Shape:
    """A model's sizes; Llama's, without its large vocabulary."""

    name: str
    d: int
    f: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32768


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1B", 2048, 8192, 16, 32, 8),
        Shape("3B", 3072, 8192, 28, 24, 8),
        Shape("8B", 4096, 14336, 32, 32, 8),
        Shape("tiny", 64, 160, 3, 4, 2, 512),
    )
}


class Bench:
    """One run: its device, its model, the rates it has measured, and its rows so far."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, list[Row]()
        self.rates: dict[str, float] = {}
        self._model: tuple[Shape, LlamaForCausalLM] | None = None

    def model(self, shape: Shape) -> LlamaForCausalLM:
        """The random model of a shape; the one before it is freed."""
        if self._model is None or self._model[0] != shape:
            self._model = None
            gc.collect()
            self._model = shape, build(shape, self.device)
        return self._model[1]

    def linearize(self, shape: Shape, length: int, **options: Any) -> Linearization:
        """The model at random tokens."""
        ids = torch.randint(shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        return loclin.linearize(self.model(shape), ids, memory=_MEMORY, **options)

    def seconds(self, work: Callable[[], object], runs: int = 2) -> float:
        """The fastest of some runs, each until the device has done its work."""

        def run() -> None:
            work()
            wait_for(self.device)

        return min(timed(run) for _ in range(runs))

    def peak(self, label: str) -> Iterator[Row]:
        """The most memory that tensors have held on a GPU since the last call."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield Row(f"{label}, peak memory, weights included", most / 1e9, "GB")

    def forget_peak(self) -> None:
        """Begin to measure the peak anew."""
        for _ in self.peak(""):
            pass

    def limit(self, lin: Linearization, columns: int) -> float:
        """The seconds that so many columns take at the card's float32 rate."""
        return 2 * columns * lin.trace.length * linear_weights(lin.model.hf) / self.rates["float32"]


def fresh(lin: Linearization) -> CountedMap:
    """The map embed -> final with nothing kept from earlier calls."""
    J = lin.jacobian()
    return CountedMap(lin.chain, J.source, J.target, J.position, budget=lin.allowance)


def build(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """A random Llama in float32 on a device, its weights exact in bfloat16."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d,
        intermediate_size=shape.f,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    with device, torch.no_grad():
        model = LlamaForCausalLM(config).eval()
        generator = torch.Generator(device).manual_seed(0)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
            weight.copy_(weight.bfloat16())
    return model


def measure_rates(bench: Bench) -> Iterator[Row]:
    side = _SIDE[bench.device.type]
    rate = partial(matmul_rate, bench.device, side=side)
    bench.rates["float32"] = rate()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        bench.rates["TF32"] = rate()
    finally:
        torch.set_float32_matmul_precision(before)
    bench.rates["bfloat16"] = rate(dtype=torch.bfloat16)
    for name, found in bench.rates.items():
        yield Row(f"one {side} x {side} product in {name}", found / 1e12, "Tflop/s")


def measure_dense(bench: Bench, shape: Shape, length: int, demand: bool) -> Iterator[Row]:
    label = f"{shape.name}, {length} tokens"
    lin = bench.linearize(shape, length)
    again = bench.seconds(lambda: bench.linearize(shape, length))
    certificate = lin.certify()
    bench.forget_peak()
    seconds = bench.seconds(lambda: fresh(lin).dense())
    limit = bench.limit(lin, shape.d)
    yield Row(f"{label}: dense J", seconds, "s", "float32 limit", seconds / limit, 1 / _SHARE if demand else None)
    yield from bench.peak(f"{label}: dense J")
    yield Row(f"{label}: linearize", again, "s", "dense J", again / seconds)
    yield Row(f"{label}: certificate", certificate.reconstruction_error, "relative", demand=_CERTIFICATE)
    yield from measure_layers(bench, lin, label, seconds, demand)
    yield from measure_split(bench, shape, length, label, seconds)


def measure_layers(bench: Bench, lin: Linearization, label: str, dense: float, demand: bool) -> Iterator[Row]:
    def sweep() -> None:
        for _ in layer_maps(lin.chain, "cumulative", lin.trace.length - 1, COMPONENTS, normed=False):
            pass

    seconds = bench.seconds(sweep)
    yield Row(f"{label}: all layers' maps", seconds, "s", "dense J", seconds / dense, _LAYERS if demand else None)
    seconds = bench.seconds(lambda: lin.layer_spectra(k=_K), runs=1)
    yield Row(f"{label}: all layers' spectra, k={_K}", seconds, "s", "dense J", seconds / dense)


def measure_split(bench: Bench, shape: Shape, length: int, label: str, float32: float) -> Iterator[Row]:
    """Float32's accuracy by bfloat16 products, where this version has it."""
    if "split" not in get_args(Precision):
        return
    lin = bench.linearize(shape, length, precision="split")
    seconds = bench.seconds(lambda: fresh(lin).dense())
    yield Row(f"{label}: dense J, split", seconds, "s", "dense J", seconds / float32, 1 / _SPLIT)
    error = lin.certify().reconstruction_error
    yield Row(f"{label}: certificate, split", error, "relative", demand=_CERTIFICATE)


def measure_jacrev(bench: Bench, shape: Shape, length: int, demand: bool) -> Iterator[Row]:
    label = f"{shape.name}, {length} tokens"
    lin = bench.linearize(shape, length)
    ours = fresh(lin).dense()
    seconds = bench.seconds(lambda: fresh(lin).dense())
    jacrev = torch.func.jacrev(whole_graph(lin), chunk_size=128)
    bench.forget_peak()
    theirs = jacrev(lin.embeddings)
    yield Row(f"{label}: difference from jacrev", float((theirs - ours).norm() / ours.norm()), "relative", demand=1e-5)
    del theirs
    other = bench.seconds(lambda: jacrev(lin.embeddings), runs=1)
    yield Row(f"{label}: jacrev", other, "s")
    yield from bench.peak(f"{label}: jacrev")
    yield Row(
        f"{label}: dense J beside jacrev", seconds, "s", "jacrev", seconds / other, 1 / _JACREV if demand else None
    )


def measure_spectra(bench: Bench, shape: Shape, length: int) -> Iterator[Row]:
    label = f"{shape.name}, {length} tokens"
    lin = bench.linearize(shape, length)
    limit = bench.limit(lin, shape.d)
    for name, joint in (("joint", True), ("per-token", False)):
        seconds = bench.seconds(partial(_decompose, lin, joint), runs=1)
        yield Row(f"{label}: {name} SVD, k={_K}", seconds, "s", "float32 limit of dense J", seconds / limit)


def _decompose(lin: Linearization, joint: bool) -> object:
    return fresh(lin).svd(_K, joint=joint)


def measure_attribution(bench: Bench, shape: Shape, length: int) -> Iterator[Row]:
    label = f"{shape.name}, {length} tokens"
    lin = bench.linearize(shape, length)
    hf, ids = lin.model.hf, lin.input_ids
    with torch.no_grad():
        forward = bench.seconds(lambda: hf(input_ids=ids, use_cache=False), runs=4)
    for by in ("token", "layer", "head", "neuron"):
        seconds = bench.seconds(partial(lin.attribute, by=by))
        yield Row(f"{label}: attribution by {by}", seconds, "s", "one forward pass", seconds / forward)


def measure_columns(bench: Bench, shape: Shape, length: int) -> Iterator[Row]:
    """Some columns alone, where the whole map would take minutes or more memory than there is."""
    lin = bench.linearize(shape, length)
    cotangents = torch.randn(_COLUMNS, shape.d, device=bench.device)
    bench.forget_peak()
    seconds = bench.seconds(lambda: lin.jacobian().rmatmat(cotangents))
    limit = bench.limit(lin, _COLUMNS)
    label = f"{shape.name}, {length} tokens: {_COLUMNS} columns"
    yield Row(label, seconds, "s", "float32 limit", seconds / limit)
    yield from bench.peak(label)


Part = tuple[str, Callable[[Bench], Iterator[Row]]]


def list_parts(quick: bool) -> list[Part]:
    """Everything that is measured: what is demanded first, and models of one shape behind one another."""
    three, one, eight = (SHAPES["tiny" if quick else name] for name in ("3B", "1B", "8B"))
    long, demand = (24, False) if quick else (512, True)
    parts: list[Part] = [
        ("rates", measure_rates),
        ("dense map", partial(measure_dense, shape=three, length=8, demand=demand)),
        ("jacrev", partial(measure_jacrev, shape=three, length=8, demand=demand)),
        ("SVDs", partial(measure_spectra, shape=three, length=8)),
        ("attribution", partial(measure_attribution, shape=three, length=8)),
        ("columns", partial(measure_columns, shape=three, length=long)),
        ("attribution", partial(measure_attribution, shape=three, length=long)),
    ]
    for shape in () if quick else (one, eight):
        parts += [
            ("dense map", partial(measure_dense, shape=shape, length=8, demand=False)),
            ("SVDs", partial(measure_spectra, shape=shape, length=8)),
            ("columns", partial(measure_columns, shape=shape, length=long)),
            ("attribution", partial(measure_attribution, shape=shape, length=8)),
        ]
        if shape is one:
            parts.append(("jacrev", partial(measure_jacrev, shape=shape, length=8, demand=False)))
    return parts


def run(bench: Bench, name: str, parts: list[Part], seconds: float) -> list[str]:
    """Run the parts until the time is over; returns what was left out or failed, one line each."""
    start, missing = time.monotonic(), list[str]()
    for label, part in parts:
        spent = time.monotonic() - start
        if spent > seconds:
            missing.append(f"{label}: left out after {spent:.0f} s")
            continue
        say(f"{label}, after {spent:.0f} s")
        try:
            for row in part(bench):
                bench.rows.append(row)
        except (RuntimeError, loclin.LoclinError) as fault:  # the other parts are still worth their time
            missing.append(f"{label}: {type(fault).__name__}: {str(fault).splitlines()[0]}")
        write(name, bench.rows, missing=missing)
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="on the processor, where there is no GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes alone")
    parser.add_argument("--seconds", type=float, default=420, help="begin no part later than this (420)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met, or a part failed")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("torch finds no CUDA device; bench/gpu.py --cpu --quick runs the same code here", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cpu" if options.cpu else "cuda:0")
    card = "cpu" if options.cpu else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    name = f"gpu-{card}" + ("-quick" if options.quick else "")
    bench = Bench(device)
    missing = run(bench, name, list_parts(options.quick), options.seconds)
    for line in missing:
        print(line)
    report(name, bench.rows, options.check, missing=missing)
    if options.check and missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
