"""`loclin plan` beside the run that it plans: peak memory and flops of ten configurations, each in its own process.

Peak memory is what the system says of a process when it has ended, less that of one that only imports the package.
Flops are those of matrix products that the run makes, in one thread: other threads are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import loclin
from harness import Row, arguments, report, say
from loclin.analyses.estimate import ANALYSES
from loclin.network.cost import given_rate

MOST_MEMORY, MOST_FLOPS = 0.15, 0.05
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
    Trial("gemma-3-270m", 8, "attribute-layer"),
    Trial("llama", 64, "dense"),
    Trial("qwen3", 512, "attribute"),
    Trial("mistral", 64, "certify", "bfloat16"),
    Trial("phi3", 32, "attribute-layer"),
    Trial("olmo2", 8, "svd"),
)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run(Trial(**json.loads(sys.argv[2])) if len(sys.argv) > 2 else None)
        return
    options = arguments(__doc__ or "")
    base, rows = in_process()["peak"], []
    for trial in TRIALS[:1] if options.quick else TRIALS:
        found, planned = in_process(trial), plan(trial)
        peak = found["peak"] - base
        pairs = (
            ("peak", planned.peak, peak, "B", MOST_MEMORY),
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
        if trial.model in ("smollm2-135m", "gemma-3-270m"):
            return loclin.estimate(trial.model, **options).analyses[-1]
        config_of(trial).save_pretrained(folder)
        return loclin.estimate(trial.model, config_file=f"{folder}/config.json", **options).analyses[-1]


def in_process(trial: Trial | None = None) -> dict[str, float]:
    """Run a trial, or nothing, in a process of its own; its flops and its peak."""
    command = [sys.executable, __file__, "--child", *([json.dumps(asdict(trial))] if trial else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(printed.splitlines()[-1]) | {"peak": used.ru_maxrss * 1024}


def run(trial: Trial | None) -> None:
    """Run what is planned, and print its flops."""
    counter = FlopCounterMode(display=False)
    if trial is not None:
        torch.manual_seed(0)
        given_rate.set(RATE)  # as planned for, and not measured among the flops
        if trial.model in ("smollm2-135m", "gemma-3-270m"):
            model = loclin.load(trial.model, dtype=trial.dtype)
        else:
            hf = AutoModelForCausalLM.from_config(config_of(trial), dtype=getattr(torch, trial.dtype))
            model = loclin.wrap(hf.eval())
        ids = torch.arange(5, 5 + trial.tokens)[None]
        with counter:
            lin = loclin.linearize(model, ids, memory=BUDGET)
            ANALYSES[trial.analysis](lin)
    print(json.dumps({"flops": counter.get_total_flops()}))


if __name__ == "__main__":
    main()
