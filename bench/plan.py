"""`loclin plan` beside the run that it plans: peak memory and flops of ten configurations, each in its own process.

Peak memory is the size of the weights, and how far the process's resident memory rises above that of the loaded model:
reading a checkpoint may take its weights twice for a moment, whatever is run afterwards. Flops are those of matrix
products that the run makes, in one thread: those of other threads are not counted. Two models have float64: shares
whose sum float32 rounds too much are computed again, and a plan cannot know that.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import loclin
from harness import Row, arguments, extra_peak_bytes, in_new_process, report, say
from loclin.analyses.estimate import ANALYSES
from loclin.models.gguf.packaged import PACKAGED
from loclin.network.cost import given_rate

MOST_MEMORY, MOST_FLOPS = 0.15, 0.05
ATTENTION = {  # which torch does not count: of queries [B, H, T, d] with keys and values [B, H, S, d]
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, _v, *_, **__: 4 * math.prod(q) * k[-2]
}
BUDGET, RATE = "500MB", 1e11
SIZES = {
    "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model (a packaged one, or a family at `SIZES` with random weights), a length, and what is run."""

    model: str
    tokens: int
    analysis: str
    dtype: str = "float32"
    sizes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model} {self.dtype}, {self.tokens} tokens: {self.analysis}"


TRIALS = (
    Trial("smollm2-135m", 8, "dense"),
    Trial("smollm2-135m", 8, "explain"),
    Trial("smollm2-135m", 8, "layers"),
    Trial("smollm2-135m", 256, "attribute"),
    Trial("gemma-3-270m", 8, "attribute-layer", "float64"),
    Trial("llama", 64, "dense"),
    Trial("qwen3", 512, "attribute", "float64"),
    Trial("mistral", 64, "certify", "bfloat16"),
    Trial("phi3", 32, "attribute-layer"),
    Trial("olmo2", 8, "svd"),
)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run(Trial(**json.loads(sys.argv[2])))
        return
    options = arguments(__doc__ or "")
    rows = []
    for trial in TRIALS[:1] if options.quick else TRIALS:
        found, planned = in_process(trial), plan(trial)
        pairs = (
            ("peak", planned.peak, found["peak"], "B", MOST_MEMORY),
            ("flops", planned.flops, found["flops"], "", MOST_FLOPS),
        )
        for what, value, actual, unit, demand in pairs:
            say(f"{trial}: {what} planned {value:.4g}, run {actual:.4g}")
            rows.append(Row(f"{trial}: planned {what}", value, unit, f"run: {actual:.4g}"))
            rows.append(Row(f"{trial}: {what} off by", abs(value / actual - 1), "of the run's", demand=demand))
    report("plan", rows, options.check)


def config_of(trial: Trial) -> Any:
    """The config of a trial's random model."""
    return AutoConfig.for_model(trial.model, **{**SIZES, **trial.sizes}, tie_word_embeddings=False)


def plan(trial: Trial) -> Any:
    """The plan of a trial, from its config alone."""
    options = {"tokens": trial.tokens, "analyses": [trial.analysis], "dtype": trial.dtype, "memory": BUDGET}
    options |= {"rate_flops": RATE, "rate_memory": 1e10, "progress": False}
    with TemporaryDirectory() as folder:
        if trial.model in PACKAGED:
            return loclin.estimate(trial.model, **options).analyses[-1]
        config_of(trial).save_pretrained(folder)
        return loclin.estimate(trial.model, config_file=f"{folder}/config.json", **options).analyses[-1]


def in_process(trial: Trial) -> dict[str, float]:
    """Run a trial in a process of its own; its flops and its peak."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return json.loads(in_new_process(__file__, "--child", json.dumps(asdict(trial))).splitlines()[-1])


def run(trial: Trial) -> None:
    """Run what is planned, and print its flops and its peak."""
    torch.manual_seed(0)
    given_rate.set(RATE)  # as planned for, and not measured among the flops
    if trial.model in PACKAGED:
        model = loclin.load(trial.model, dtype=trial.dtype)
    else:
        hf = AutoModelForCausalLM.from_config(config_of(trial), dtype=getattr(torch, trial.dtype))
        model = loclin.wrap(hf.eval())
    ids, counter = torch.arange(5, 5 + trial.tokens)[None], FlopCounterMode(display=False, custom_mapping=ATTENTION)
    weights = sum(weight.nbytes for weight in [*model.hf.parameters(), *model.hf.buffers()])

    def work() -> object:
        with counter:
            lin = loclin.linearize(model, ids, memory=BUDGET)
            return lin, ANALYSES[trial.analysis](lin)

    rise = extra_peak_bytes(work)
    print(json.dumps({"flops": counter.get_total_flops(), "peak": weights + rise}))


if __name__ == "__main__":
    main()
