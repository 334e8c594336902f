"""Greedy generation, explained at every step, and how each token's map changes from one step to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.groups import Grouping, Skip
from loclin.analyses.explain import Explanation, explain
from loclin.common.arguments import whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.sums import norms
from loclin.errors import PromptError
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns
from loclin.spectral import SVD

_TRIPLES = 4


@dataclass(frozen=True)
class Drift:
    """How one token's map J changes to J' from one step to the next.

    `writes` and `reads` are the angles in degrees between the first left (right) singular vectors; for near-equal
    singular values, the largest angle between their subspaces.
    """

    change: float  # |J' - J|_F / |J|_F
    cosine: float  # <J', J> / (|J'|_F |J|_F): 1 if only the norm changed
    writes: float
    reads: float


@dataclass(frozen=True)
class Generation(Result):
    """A generated text, with an explanation of every token; made by `generate`.

    Attributes
    ----------
    text: the generated text, as the continuation of the prompt.
    steps: the explanation of each prediction. The target of a step is the last token of the next step.
    drift: for each step but the first, the drift of every token of the previous step.
    provenance, warnings: that of the first step, and those of all steps.
    """

    text: str
    steps: list[Explanation]
    drift: list[list[Drift]]
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per generated token."""
        found = ((step.target, step.certificate) for step in self.steps)
        rows = ((t["text"], t["id"], t["probability"], c.reconstruction_error, c.passed) for t, c in found)
        return make_columns("token id probability reconstruction_error passed", rows)


@question
@with_progress
def generate(
    lin: Linearized,
    max_new_tokens: int,
    *,
    k: int = 8,
    group: Grouping | None = None,
    skip: Skip | None = None,
    progress: Progress = True,
) -> Generation:
    """Generate tokens greedily and explain each of them (paper, Figure 2, for every step).

    Every step is linearized anew, at the prompt and all generated tokens, so that every map is exact. Generation stops
    early if the model ends the text.

    Cost: that of `explain` and a few more singular vectors for each step. Memory: two dense maps.

    Raises OptionError when `max_new_tokens` is not a whole number from 1; PromptError when the text would be longer
    than the model's context.

    Parameters
    ----------
    lin: the prompt, from `loclin.linearize`.
    max_new_tokens: the largest number of tokens to generate.
    k: how many singular vectors of each token to put into words.
    group, skip: add the tokens' shares up in every step, and leave tokens out of rankings; see `loclin.explain`.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    lin.model.refuse_other_tasks("generation", "causal", "seq2seq")
    count, k, tell = whole("max_new_tokens", max_new_tokens, 1), whole("k", k), steps(progress)
    limit = lin.model.context_length
    if limit is not None and len(lin.tokens) + count - 1 > limit:
        raise PromptError(
            f"{len(lin.tokens)} tokens and {count} more: {lin.model.info.name} takes at most {limit}; generate fewer"
        )
    explained: list[Explanation] = []
    drift: list[list[Drift]] = []
    before: tuple[Tensor, SVD] | None = None
    prompt = lin.input_ids[0].tolist()
    for number in range(1, count + 1):
        found = explain(
            lin,
            k=k,
            group=group,
            skip=skip,
            progress=lambda step, number=number: tell(f"token {number}: {step}"),  # type: ignore[misc]
        )
        explained.append(found)
        J = lin.jacobian()
        now = J.dense(), J.svd(min(_TRIPLES, J.shape[0], J.shape[2]), tolerance=1e-5)
        if before is not None:
            drift.append([_measure_drift(i, *before, *now) for i in range(before[0].shape[1])])
        before, token = now, found.target["id"]
        if number == count or token in lin.model.stops:
            break
        lin = lin.followed_by(token)
    text = lin.model.tokens.continuation(prompt, [step.target["id"] for step in explained])
    warnings = list(dict.fromkeys(text for step in explained for text in step.warnings))
    return Generation(text, explained, drift, explained[0].provenance, warnings)


def _measure_drift(
    token: int, old: Float[Tensor, "o T i"], old_svd: SVD, new: Float[Tensor, "o T2 i"], new_svd: SVD
) -> Drift:
    a, b = old[:, token], new[:, token]
    size, other = norms(a).item(), norms(b).item()
    if not size or not other:  # one of the maps is zero
        return Drift(0.0, 1.0, 0.0, 0.0) if size == other else Drift(1.0, 0.0, 90.0, 90.0)
    cosine = ((a * b).sum() / (size * other)).item()
    old_t, new_t = (replace(svd, U=svd.Vh.mT, Vh=svd.U.mT) for svd in (old_svd, new_svd))  # of the transposed maps
    writes, reads = _measure_angle(old_svd, new_svd, token), _measure_angle(old_t, new_t, token)
    return Drift(norms(b - a).item() / size, cosine, writes, reads)


def _measure_angle(old: SVD, new: SVD, token: int) -> float:
    """Measure the largest angle, in degrees, between the first block of one SVD and as many vectors of the other."""
    return math.degrees(old.subspace_angles(new, token)[0].max().item())
