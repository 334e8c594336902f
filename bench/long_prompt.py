"""SmolLM2 at 4 096 tokens: seconds beside the model's own forward pass, and all that is resident, with the model.

The dense map, in a file, is that of 1 024 tokens; its seconds are set against the matmul limit of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import loclin
from harness import Row, arguments, forget_peak, matmul_rate, report, resident_peak_bytes, say, timed
from loclin.linearization import Linearization
from loclin.models import Model
from models import PARAGRAPH, fresh, linear_weights

PARTS = ("passes", "more", "dense")
MEMORY = "2GB"
LENGTH, DENSE_LENGTH, QUICK_LENGTH = 4096, 1024, 256
MOST_GB, MOST_GB_DENSE, MOST_OF_LIMIT = 4.0, 6.0, 1.2
MOST_PASSES = {"linearize": 3.0, "shares by token": 2.0, "shares by layer": 2.0}


def main() -> None:
    options = arguments(__doc__ or "", PARTS)
    model = loclin.load("smollm2-135m")
    rows: list[Row] = []
    for part, measured in (("passes", measure_passes), ("more", measure_more)):
        if part in options.parts:
            rows += measured(model, QUICK_LENGTH if options.quick else LENGTH)
    if "dense" in options.parts:
        rows += measure_dense(model, QUICK_LENGTH if options.quick else DENSE_LENGTH)
    report("long_prompt", rows, options.check, partly=len(options.parts) < len(PARTS))


def prompt(model: Model, length: int) -> Tensor:
    """So many token ids of ordinary text `[1, T]`."""
    return model.encode(PARAGRAPH * math.ceil(length / 128), bos=True)[:, :length]


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, GB that are resident at most) of a call."""
    forget_peak()
    return timed(work), resident_peak_bytes() / 1e9


def measure_forward(model: Model, ids: Tensor) -> float:
    """Seconds of one forward pass of the model, with one row of logits."""
    with torch.no_grad():
        return timed(lambda: model.hf(ids, use_cache=False, logits_to_keep=1))


def measure_works(length: int, forward: float, works: dict[str, Callable[[], object]]) -> list[Row]:
    """Calls, in forward passes of so many seconds, and their memory."""
    rows = []
    for name, work in works.items():
        seconds, peak = measure(work)
        label, against = f"{length} tokens: {name}", "the model's forward pass"
        say(f"{label}: {seconds:.1f} s, {seconds / forward:.2f} passes, {peak:.2f} GB resident")
        rows.append(Row(label, seconds, "s", against, seconds / forward, MOST_PASSES.get(name)))
        rows.append(Row(f"{label}: resident peak", peak, "GB", demand=MOST_GB))
    return rows


def measure_passes(model: Model, length: int) -> list[Row]:
    """`linearize`, shares by token and by layer."""
    ids = prompt(model, length)
    made: list[Linearization] = []
    forward = min(measure_forward(model, ids) for _ in range(2))
    works: dict[str, Callable[[], object]] = {
        "linearize": lambda: made.append(loclin.linearize(model, ids, memory=MEMORY)),
        "shares by token": lambda: made[0].attribute(by="token", progress=False),
        "shares by layer": lambda: made[0].attribute(by="layer", in_words=0, progress=False),
        "logit lens": lambda: made[0].logit_lens(),
    }
    return [Row(f"{length} tokens: forward pass", forward, "s"), *measure_works(length, forward, works)]


def measure_more(model: Model, length: int) -> list[Row]:
    """What takes longer: shares by head, and the certificate."""
    ids = prompt(model, length)
    forward, lin = measure_forward(model, ids), loclin.linearize(model, ids, memory=MEMORY)
    heads = partial(lin.attribute, by="head", progress=False)
    rows = measure_works(length, forward, {"certify": lin.certify, "shares by head": heads})
    wrong = float(not lin.certify().passed)
    return [*rows, Row(f"{length} tokens: errors within the tolerance", wrong, "0 = yes", demand=0)]


def measure_dense(model: Model, length: int) -> list[Row]:
    """The dense map, written to a file within the budget, against the matmul limit, and its memory."""
    rates, lin = [matmul_rate()], loclin.linearize(model, prompt(model, length), memory=MEMORY)
    with TemporaryDirectory() as folder:
        J = fresh(lin, lin.memory)
        seconds, peak = measure(lambda: J.dense(path=Path(folder) / "J.npy"))
    rates.append(matmul_rate())
    limit = 2 * J.shape[0] * length * linear_weights(model.hf) / max(rates)
    say(f"{length} tokens: dense map: {seconds:.1f} s, limit {limit:.1f} s, {peak:.2f} GB resident")
    label = f"{length} tokens: dense map in a file"
    return [
        Row(label, seconds, "s", "matmul limit", seconds / limit, MOST_OF_LIMIT),
        Row(f"{label}: resident peak", peak, "GB", demand=MOST_GB_DENSE),
    ]


if __name__ == "__main__":
    main()
