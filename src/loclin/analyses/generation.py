"""Greedy generation, explained at every step, and how each token's map moves from one step to the next."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.explain import Explanation, explain
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.sums import norms
from loclin.common.surroundings import in_plain_torch
from loclin.errors import PromptError
from loclin.maps.linearized import Linearized
from loclin.spectral import SVD

_TRIPLES = 4


@dataclass(frozen=True)
class Drift:
    """How one token's map moved between two steps.

    Attributes
    ----------
    change
        |J' - J|_F / |J|_F.
    cosine
        <J', J> / (|J'|_F |J|_F): 1 where only the size changed.
    writes, reads
        The angle in degrees between the top left (right) singular vectors; of near-equal ones, the largest angle
        between their subspaces.
    """

    change: float
    cosine: float
    writes: float
    reads: float


@dataclass(frozen=True)
class Generation:
    """Made by `generate`.

    Attributes
    ----------
    text
        What was generated, as it goes on from the prompt.
    steps
        The explanation of each prediction; each one's target is the next one's last token.
    drift
        For each step but the first, the drift of every token that the step before had.
    """

    text: str
    steps: list[Explanation]
    drift: list[list[Drift]]

    __repr__ = brief

    def to_json(self) -> str:
        """All steps as JSON text; floats that are not finite do not occur."""
        drift = [[asdict(token) for token in step] for step in self.drift]
        record: dict[str, Any] = {"text": self.text, "drift": drift, "steps": [step.to_dict() for step in self.steps]}
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)


@in_plain_torch
def generate(lin: Linearized, count: int, k: int = 8, progress: Progress = silent) -> Generation:
    """Generate tokens greedily and explain every one of them (paper, Figure 2, for every step).

    Every step is linearized anew at the prompt and all that was generated, so that every map is exact. It ends early
    where the model ends the text.

    Parameters
    ----------
    lin
        The prompt, from `loclin.linearize`.
    count
        How many tokens.
    k
        How many singular vectors of each token to put into words.
    progress
        Told the name of each step as it begins.

    Raises
    ------
    OptionError
        When `count` is no whole number from 1.
    PromptError
        When the text would be longer than the model's context.

    Notes
    -----
    Cost: that of `explain` for each step, and a few singular vectors more. Memory: two dense maps.
    """
    count, k = whole("count", count, 1), whole("k", k)
    limit = lin.model.context_length
    if limit is not None and len(lin.tokens) + count - 1 > limit:
        raise PromptError(f"{len(lin.tokens)} tokens and {count} more: {lin.model.info.name} takes at most {limit}")
    steps: list[Explanation] = []
    drift: list[list[Drift]] = []
    before: tuple[Tensor, SVD] | None = None
    prompt = lin.input_ids[0].tolist()
    for number in range(1, count + 1):
        found = explain(lin, k, progress=lambda step, number=number: progress(f"token {number}: {step}"))  # type: ignore[misc]
        J = lin.jacobian()
        now = J.dense(), J.svd(min(_TRIPLES, J.shape[0], J.shape[2]), tolerance=1e-5)
        if before is not None:
            drift.append([_drift(i, *before, *now) for i in range(before[0].shape[1])])
        steps.append(found)
        before = now
        token = found.target["id"]
        if number == count or token in lin.model.stops:
            break
        lin = lin.followed_by(token)
    text = lin.model.tokens.continuation(prompt, [step.target["id"] for step in steps])
    return Generation(text, steps, drift)


def _drift(token: int, old: Float[Tensor, "o T i"], old_svd: SVD, new: Float[Tensor, "o T2 i"], new_svd: SVD) -> Drift:
    a, b = old[:, token], new[:, token]
    size, other = norms(a).item(), norms(b).item()
    if not size or not other:  # a map that is zero: no part of the one has a likeness in the other
        same = size == other
        return Drift(0.0 if same else 1.0, 1.0 if same else 0.0, 0.0 if same else 90.0, 0.0 if same else 90.0)
    cosine = ((a * b).sum() / (size * other)).item()
    reads = _angle(_turned(old_svd), _turned(new_svd), token)
    return Drift(norms(b - a).item() / size, cosine, _angle(old_svd, new_svd, token), reads)


def _angle(old: SVD, new: SVD, token: int) -> float:
    """The largest angle, in degrees, between the first block of one and as many vectors of the other."""
    return math.degrees(old.subspace_angles(new, token)[0].max().item())


def _turned(found: SVD) -> SVD:
    """The decomposition of the transposes."""
    return replace(found, U=found.Vh.mT, Vh=found.U.mT)
