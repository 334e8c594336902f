"""A model of Llama 3.2 3B's shape in bfloat16 at 8 tokens: seconds, and memory beyond the weights, of every analysis.

The weights are random, scaled so that spectra decay. A float32 forward pass of the shape is measured one layer at a
time, since a float32 copy of the whole model would be 13 GB; `svd` is set against the matmul limit of its columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loclin
from harness import Row, arguments, extra_peak_bytes, matmul_rate, report, resident_peak_bytes, say, timed
from models import decay, fresh, linear_weights

_LENGTH, _GAIN = 8, 2.0
_MOST_BYTES, _MOST_PASSES, _MOST_OF_LIMIT = 2e9, 3.0, 1.5


def llama(layers: int, vocabulary: int) -> LlamaForCausalLM:
    """A random Llama of Llama 3.2 3B's width in bfloat16; `layers=28, vocabulary=128256` is the whole shape."""
    d, f = 3072, 8192
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        initializer_range=d**-0.5,
    )
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight.mul_(_GAIN * math.sqrt(d / weight.shape[1]))
        model.get_input_embeddings().weight.mul_(math.sqrt(d))
        model.model.norm.weight.copy_(decay(d)[torch.randperm(d)])
    return model


def forward_seconds(model: LlamaForCausalLM, repeats: int) -> float:
    """The seconds of a float32 forward pass, from those of one layer and of a part of the output head."""
    layer, d = copy.deepcopy(model.model.layers[0]).float(), model.config.hidden_size
    x = torch.randn(1, _LENGTH, d)
    angles = model.model.rotary_emb(x, torch.arange(_LENGTH)[None])
    vocabulary = model.config.vocab_size
    some = model.lm_head.weight[: vocabulary // 4].float()
    with torch.no_grad():
        one = min(timed(lambda: layer(x, position_embeddings=angles)) for _ in range(repeats))
        part = min(timed(lambda: x[0, -1:] @ some.T) for _ in range(repeats))
    return one * model.config.num_hidden_layers + part * vocabulary / len(some)


class Meter:
    """Measures seconds, and the peak of resident memory beyond what there was when it was made."""

    def __init__(self) -> None:
        extra_peak_bytes(lambda: None)
        self._before = resident_peak_bytes()

    def __call__(self, name: str, work: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """(seconds at best, bytes) of a call; the first has to import what it needs."""
        seconds: list[float] = []
        extra_peak_bytes(lambda: seconds.extend(timed(work) for _ in range(repeats)))
        peak = float(max(0, resident_peak_bytes() - self._before))
        say(f"{name}: {min(seconds):.2f} s, {peak / 1e9:.2f} GB beyond the weights")
        return min(seconds), peak


def main() -> None:
    options = arguments(__doc__ or "")
    layers, vocabulary = (2, 8192) if options.quick else (28, 128256)
    model = llama(layers, vocabulary)
    weights = sum(weight.nbytes for weight in model.parameters())
    say(f"{layers} layers, {weights / 1e9:.2f} GB of weights")
    ids = torch.randint(vocabulary, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    passes, rates = [forward_seconds(model, 5)], [matmul_rate()]
    meter, found = Meter(), {}
    made: list[loclin.Linearization] = []
    found["linearize"] = meter("linearize", lambda: made.append(loclin.linearize(model, ids)))
    (lin,) = made
    for by in ("token", "layer", "head"):
        name = f"shares by {by}"
        found[name] = meter(name, lambda by=by: loclin.attribute(lin, by=by, progress=False), 2)
    found["certify"] = meter("certify", lin.certify)
    J = fresh(lin, None)
    found["svd(k=8, joint)"] = meter("svd(k=8, joint)", lambda: J.svd(k=8, joint=True))
    passes.append(forward_seconds(model, 5))
    rates.append(matmul_rate())
    forward = min(passes)
    limit = 2 * J.columns * _LENGTH * linear_weights(model) / max(rates)
    rows = [Row("weights", weights / 1e9, "GB"), Row("float32 forward pass", forward, "s")]
    rows.append(Row("certify: errors within the tolerance", float(not lin.certify().passed), "0 = yes", demand=0))
    for name, (seconds, peak) in found.items():
        against, ratio, demand = "float32 forward pass", seconds / forward, None
        if name.startswith("svd"):
            against, ratio, demand = f"matmul limit of {J.columns} columns", seconds / limit, _MOST_OF_LIMIT
        elif name == "shares by token":
            demand = _MOST_PASSES
        rows.append(Row(name, seconds, "s", against, ratio, demand))
        rows.append(Row(f"{name}: peak beyond the weights", peak / 1e9, "GB", demand=_MOST_BYTES / 1e9))
    report("wide", rows, options.check)


if __name__ == "__main__":
    main()
