"""Why a head attends there: its score for a query and a key, as shares of what each of the two reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.attribute import attribute
from loclin.analyses.attribution.groups import Grouping, Skip
from loclin.analyses.attribution.readout import find_key, open_scores
from loclin.analyses.attribution.result import Attribution
from loclin.analyses.attribution.target import SIDES, Score
from loclin.common.progress import Progress, with_progress
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns


@dataclass(frozen=True, eq=False)
class AttentionScore(Result):
    """The attention score of a head for a query and a key; made by `attention_score`.

    Attributes
    ----------
    name: the head, `L3H5`.
    query, key: the two positions.
    score: the number that the softmax takes: q . k as the model scales it, plus what it adds for their distance.
    pattern: the attention probabilities of the query `[T]`.
    by_query: the score as shares of what the query reads, with the key held. They sum to the score.
    by_key: the score as shares of what the key reads, with the query held. They sum to the score.
    """

    name: str
    query: int
    key: int
    score: float
    pattern: Float[Tensor, " T"]
    by_query: Attribution
    by_key: Attribution
    warnings: list[str]
    provenance: Provenance

    derived = ("probability",)

    @property
    def probability(self) -> float:
        """The attention probability of the key."""
        return self.pattern[self.key].item()

    def table(self) -> dict[str, list[Any]]:
        """One row per share of each side: the side, and name, kind, layer, index, token and share."""
        rows = (
            (side, one.name, one.kind, one.layer, one.index, one.token, one.share)
            for side, found in zip(SIDES, (self.by_query, self.by_key), strict=True)
            for one in found.parts
        )
        return make_columns("side name kind layer index token share", rows)


@question
@with_progress
def attention_score(
    lin: Linearized,
    head: str,
    *,
    key: int | None = None,
    query: int = -1,
    by: Grouping = "token",
    skip: Skip | None = None,
    progress: Progress = True,
) -> AttentionScore:
    """Split the attention score of a head into exact shares, of what the query reads and of what the key reads.

    Each side is linear while the other is held: `loclin.attribute` with the target `loclin.Score`, for both sides. The
    score is the one before the softmax: the difference of two keys' scores is that of their log-probabilities.

    Cost: six forward passes of the head's layer, and twice that of `attribute` below it.

    Raises OptionError for a head or a level that does not exist, a key to which the query may not attend, or an
    attention (it is named) whose scores are not the product of a query and a key; PromptError for a position outside
    the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    head: the query head, `L3H5`; a negative number counts from the end.
    key: the position of the key; None: the one to which the query attends most, attention sinks and the beginning token
        aside.
    query: the position of the query.
    by, skip: what the shares belong to, and which tokens are left out of rankings; see `loclin.attribute`.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    at = lin.trace.target_position(query)
    scores = open_scores(lin, head, at)
    key = find_key(lin, scores, key)
    sides = [
        attribute(lin, Score(scores.name, key, side), by=by, position=at, skip=skip, progress=progress)
        for side in SIDES
    ]
    by_query, by_key = sides
    notes = dict.fromkeys([*by_query.warnings, *by_key.warnings])
    return AttentionScore(
        name=scores.name,
        query=at,
        key=key,
        score=scores.value(key),
        pattern=scores.pattern,
        by_query=by_query,
        by_key=by_key,
        warnings=list(notes),
        provenance=replace(lin.jacobian(position=at).provenance(), target=scores.name),
    )
