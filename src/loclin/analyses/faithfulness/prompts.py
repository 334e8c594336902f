"""The packaged prompts of the study, by kind, in two halves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, get_args

import numpy as np

from loclin.common.arguments import whole

Half = Literal["development", "held-out"]
HALVES: tuple[Half, ...] = get_args(Half)


@dataclass(frozen=True)
class StudyPrompt:
    """One prompt, its kind, and its half: settings are chosen on one half, results are reported on the other."""

    kind: str
    text: str
    half: Half


def load_prompts(count: int | None = None, seed: int = 0) -> list[StudyPrompt]:
    """Load `count` or all of the packaged prompts in a random order that alternates between kinds and halves."""
    kinds: dict[str, list[str]] = json.loads(files(__package__).joinpath("prompts.json").read_text("utf-8"))
    if count is not None:
        whole("prompts", count, 1, sum(map(len, kinds.values())))
    whole("seed", seed, 0)
    random = np.random.default_rng(seed)
    turns: list[tuple[int, StudyPrompt]] = []
    for kind, texts in kinds.items():
        for half, own in zip(HALVES, (texts[::2], texts[1::2]), strict=True):
            shuffled = random.permutation(own).tolist()
            turns += [(turn, StudyPrompt(kind, text, half)) for turn, text in enumerate(shuffled)]
    return [prompt for _, prompt in sorted(turns, key=lambda item: item[0])][:count]
