"""What each analysis takes beside the weights and its result, set beside the memory budget that it was given.

Each analysis of each model runs in a process of its own: it imports, loads, runs the model once and the analysis on
a tiny model (which loads what torch loads when it is first used), and only then counts the rise of resident memory.
The coefficients and recorded values that `linearize` keeps count as work. Results do not: the triples and shares that
an analysis returns, and J for `dense`. A refusal names the least budget; the analysis is then run with that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import loclin
from harness import Row, arguments, extra_peak_bytes, report, say
from loclin.errors import BudgetError
from loclin.linearization import Linearization
from loclin.network.memory import parse_memory

SLACK = 64e6
"""What malloc, the thread pools and Python may hold beyond what is in use."""
CASES = ((8, "100MB"), (128, "100MB"), (128, "300MB"), (1024, "1GB"))


def _shape(d: int, f: int, layers: int, **more: Any) -> dict[str, Any]:
    return {"vocab_size": 8000, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, **more}


def _llama(d: int, f: int, layers: int, heads: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_shape(d, f, layers, num_attention_heads=heads, num_key_value_heads=heads)))


def _gpt2(d: int, layers: int, heads: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_embd=d, n_layer=layers, n_head=heads, n_positions=4096))


def _mixtral(d: int, f: int, layers: int, heads: int) -> PreTrainedModel:
    sizes = _shape(d, f, layers, num_attention_heads=heads, num_key_value_heads=heads, num_local_experts=4)
    return MixtralForCausalLM(MixtralConfig(**sizes))


def _gemma(d: int, f: int, layers: int, heads: int) -> PreTrainedModel:
    sizes = _shape(d, f, layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=d // heads)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: loclin.load("smollm2-135m"),
    "llama": lambda: _llama(576, 1536, 4, 9).eval(),
    "gpt2": lambda: _gpt2(512, 4, 8).eval(),
    "moe": lambda: _mixtral(512, 1024, 4, 8).eval(),
    "gemma": lambda: _gemma(512, 1536, 4, 4).eval(),
}
Run = Callable[[Linearization], object]
ANALYSES: dict[str, Run] = {
    "linearize": lambda lin: lin.trace.length,
    "certify": lambda lin: lin.certify(),
    "shares by token": lambda lin: lin.attribute(by="token", progress=False),
    "shares by layer": lambda lin: lin.attribute(by="layer", progress=False),
    "shares by head": lambda lin: lin.attribute(by="head", progress=False),
    "shares by token×layer": lambda lin: lin.attribute(by="token×layer", progress=False),
    "joint svd": lambda lin: lin.jacobian().svd(k=8, joint=True, tolerance=1e-2),
    "svd": lambda lin: lin.jacobian().svd(k=2, tolerance=1e-2),
    "norms": lambda lin: lin.jacobian().norms(),
    "dense": lambda lin: lin.jacobian().dense(),
    "layers": lambda lin: lin.layer_spectra(k=4),
    "explain": lambda lin: lin.explain(k=4, progress=False),
    "validity": lambda lin: lin.validity(draws=1, swaps=1, progress=False),
    "head": lambda lin: lin.head(1, 1),
    "lens": lambda lin: lin.logit_lens(),
    "steering": lambda lin: loclin.steering.Operator.make(lin, layer=2),
}
WIDE = ("joint svd", "svd", "norms", "dense", "layers", "explain", "validity", "steering")
"""Analyses of hundreds of columns, or of hundreds of prompts: on many layers and tokens they take an hour."""


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(run(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]))
        return
    options = arguments(__doc__ or "", tuple(MODELS))
    rows = []
    for model in ["llama"] if options.quick else options.parts:
        for length, memory in CASES[:2] if options.quick else CASES:
            for analysis in ANALYSES:
                if length <= 128 or analysis not in WIDE:
                    rows.append(measure(model, length, analysis, memory))
    report("budget", rows, options.check, partly=options.quick or len(options.parts) < len(MODELS))


def measure(model: str, length: int, analysis: str, memory: str) -> Row:
    """Run an analysis with a budget; with the least one that is named, where that is refused."""
    peak, least = in_process(model, length, analysis, memory)
    if least is not None:
        memory = least
        peak, refused = in_process(model, length, analysis, least)
        if refused is not None:
            raise RuntimeError(f"{model}, {analysis}, {length} tokens: {least} is refused, too: {refused}")
    say(f"{model}, {length} tokens, {analysis}: {peak / 1e6:.0f} MB of {memory}")
    ratio = max(0.0, peak - SLACK) / parse_memory(memory)
    return Row(f"{model}, {length} tokens, {analysis}", peak, "B", f"memory={memory}", ratio, 1.0)


def in_process(*case: Any) -> tuple[float, str | None]:
    """(bytes beside the weights and the result, the least budget where the one given is refused)."""
    command = [sys.executable, __file__, "--child", *map(str, case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak, _, least = done.stdout.strip().splitlines()[-1].partition(" ")
    return float(peak), least or None


def run(name: str, length: int, analysis: str, memory: str) -> str:
    """The rise of resident memory while a prompt is linearized and analysed, without its result."""
    torch.manual_seed(0)
    built, work = MODELS[name](), ANALYSES[analysis]
    model = loclin.wrap(built) if isinstance(built, torch.nn.Module) else built
    work(loclin.linearize(_llama(64, 128, 3, 2).eval(), torch.arange(4)[None]))
    ids = torch.randint(5, 8000, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.hf(input_ids=ids[:, :4])
    found: list[Any] = []

    def measured() -> None:
        found.append(lin := loclin.linearize(model, ids, memory=memory))
        found.append(work(lin))

    try:
        peak = extra_peak_bytes(measured)
    except BudgetError as refusal:
        named = re.search(r"give memory=(\d+)", str(refusal))
        if named is None:
            raise
        return f"0 {named[1]}"
    return f"{peak - result_bytes(found[1]):.0f}"


def result_bytes(result: Any) -> int:
    """The bytes of a result's tensors."""
    if isinstance(result, Tensor):
        return result.nbytes
    if is_dataclass(result) and not isinstance(result, type):
        return sum(result_bytes(getattr(result, part.name)) for part in fields(result))
    return 0


if __name__ == "__main__":
    main()
