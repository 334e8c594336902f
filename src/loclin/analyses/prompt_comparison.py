"""Two prompts, or two models at a prompt: which tokens make the difference of a target, by content or by the map.

With the target's gradient g_i at the embedding x_i of token i, its share is g_i . x_i. Of two aligned tokens the change
of the share is, exactly, (g + g')/2 . (x' - x), the content, plus (g' - g) . (x + x')/2, the map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.groups import UNITS, find_groups, find_skipped
from loclin.analyses.attribution.readout import read_target
from loclin.analyses.attribution.result import KINDS
from loclin.analyses.attribution.shares import compute_shares, share_by_source
from loclin.analyses.attribution.target import Target
from loclin.common.brief import brief
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns


@dataclass(frozen=True)
class Pair:
    """Aligned tokens or words of two prompts; one side is empty for what the other prompt alone has.

    Attributes
    ----------
    first, second: the texts.
    at, other: the positions in each prompt.
    before, after: the shares of the target in the first and in the second prompt.
    content: the part of the change that comes from other embeddings, with the mean of both maps; None where the tokens
        cannot be paired one by one.
    map: the part that comes from another map of the same embedding.
    """

    first: str
    second: str
    at: list[int]
    other: list[int]
    before: float
    after: float
    content: float | None
    map: float | None

    __repr__ = brief

    @property
    def change(self) -> float:
        """The change of the share."""
        return self.after - self.before


@dataclass(frozen=True)
class PromptComparison(Result):
    """The change of a target from one prompt to another, as a sum over tokens and biases; made by `compare_prompts`.

    Attributes
    ----------
    target: as in `Attribution`, in the first prompt; `value` there.
    value: the target's value in the second prompt.
    pairs: in the order of the prompts.
    biases: the shares of all biases in the first and in the second prompt.
    provenance, second: those of the first and of the second prompt.
    skipped: the numbers of pairs that are left out of rankings.
    """

    target: dict[str, Any]
    value: float
    pairs: list[Pair]
    biases: tuple[float, float]
    second: Provenance
    warnings: list[str] = field(default_factory=list)
    provenance: Provenance | None = None
    skipped: list[int] = field(default_factory=list)

    derived = ("change", "residual")

    @property
    def change(self) -> float:
        """The change of the target."""
        return self.value - float(self.target["value"])

    @property
    def residual(self) -> float:
        """The change minus the sum of the changes of all shares: rounding."""
        return self.change - sum(pair.change for pair in self.pairs) - (self.biases[1] - self.biases[0])

    def table(self) -> dict[str, list[Any]]:
        """One row per pair: both texts, both shares, the change, and its two parts."""
        rows = ((p.first, p.second, p.before, p.after, p.change, p.content, p.map) for p in self.pairs)
        return make_columns("first second before after change content map", rows)


@question
@with_progress
def compare_prompts(
    lin: Linearized,
    other: Linearized,
    target: Target = None,
    *,
    align: str | re.Pattern[str] = "token",
    skip: str | None = None,
    progress: Progress = True,
) -> PromptComparison:
    """Compare a target in two prompts of any length, or in two models: which tokens make the change, and how.

    Both are read at their last position. Cost: one column for each prompt.

    Raises OptionError for targets that name other tokens in the two, or an unknown `align`.

    Parameters
    ----------
    lin, other: two prompts of one model; or the same prompt in two models, such as a base model and the same with an
        adapter. Where their residual streams have other widths, changes are not split into content and map.
    target: see `loclin.attribute`. None: the token that the second predicts against the one that the first predicts;
        where both predict the same, its logit minus the mean of all.
    align: what is aligned, by text: `"token"`, or groups of them by a unit or a pattern, as `by` of `loclin.attribute`.
    skip: `"special"` tokens or attention `"sink"`s: left out of rankings.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    if not isinstance(align, re.Pattern) and align not in ("token", *UNITS):
        raise OptionError(f"align={align!r}: choose one of token, {', '.join(UNITS)}, or give a pattern")
    tell = steps(progress)
    target = contrast(lin, other, target)
    tell("shares in the first prompt")
    here, there = _Side.of(lin, target), _Side.of(other, target)
    if here.target["ids"] != there.target["ids"]:
        raise OptionError(
            f"the target is {here.target['tokens']} in the first prompt and {there.target['tokens']} in the second: "
            "name the token"
        )
    a, b = (_split(side.lin, align, skip) for side in (here, there))
    skipped = [set(find_skipped(side.lin, skip)) for side in (here, there)]
    pairs = [_pair(here, there, one, two) for one, two in _align(a, b)]
    return PromptComparison(
        target=here.target,
        value=there.target["value"],
        pairs=pairs,
        biases=(here.biases, there.biases),
        skipped=[i for i, pair in enumerate(pairs) if set(pair.at) <= skipped[0] and set(pair.other) <= skipped[1]],
        second=there.provenance,
        warnings=[*here.warnings, *(text for text in there.warnings if text not in here.warnings)],
        provenance=here.provenance,
    )


def contrast(lin: Linearized, other: Linearized, target: Target) -> Target:
    """A target, or without one what the second prompt predicts against what the first does, where these differ."""
    if target is not None:
        return target
    first, second = (one.next_token_ids(1)[0][0] for one in (lin, other))
    return None if first == second else (second, first)


@dataclass(frozen=True)
class _Side:
    """One prompt's shares, and the target's gradient at its embeddings."""

    lin: Linearized
    target: dict[str, Any]
    shares: list[float]
    biases: float
    gradient: Float[Tensor, "T d"]
    provenance: Provenance
    warnings: list[str]

    __repr__ = brief

    @classmethod
    def of(cls, lin: Linearized, target: Target) -> _Side:
        lin, readout = read_target(lin, target, -1)
        found = compute_shares(lin, readout, lambda chain: share_by_source(chain, readout, together=False))
        shares, biases = [0.0] * lin.trace.length, 0.0
        for kind, _, _, token, share, _ in found.rows:
            if KINDS[kind] == "token":
                shares[token] += share
            else:
                biases += share
        assert found.gradient is not None
        warnings = [*lin.warnings, *readout.warnings, *found.notes]
        provenance = replace(lin.jacobian(position=readout.position).provenance(), target=readout.at)
        return cls(lin, readout.to_dict(), shares, biases, found.gradient, provenance, warnings)


def _split(lin: Linearized, align: str | re.Pattern[str], skip: str | None) -> list[tuple[str, list[int]]]:
    if align == "token":
        return [(text, [i]) for i, text in enumerate(lin.tokens)]
    return [(group.name, group.positions) for group in find_groups(lin, align, find_skipped(lin, skip))]


def _align(
    a: list[tuple[str, list[int]]], b: list[tuple[str, list[int]]]
) -> Iterator[tuple[tuple[str, list[int]] | None, tuple[str, list[int]] | None]]:
    """Pair what is equal, and what stands between equals if it is as much on both sides."""
    matcher = SequenceMatcher(a=[text for text, _ in a], b=[text for text, _ in b], autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and i_end - i == j_end - j):
            yield from zip(a[i:i_end], b[j:j_end], strict=True)
        else:
            yield from ((one, None) for one in a[i:i_end])
            yield from ((None, one) for one in b[j:j_end])


def _pair(here: _Side, there: _Side, one: tuple[str, list[int]] | None, two: tuple[str, list[int]] | None) -> Pair:
    at, other = (one or ("", []))[1], (two or ("", []))[1]
    before, after = math.fsum(here.shares[i] for i in at), math.fsum(there.shares[i] for i in other)
    x, y, g, h = (side[places].double().cpu() for side, places in (
        (here.lin.embeddings, at), (there.lin.embeddings, other), (here.gradient, at), (there.gradient, other)
    ))  # fmt: skip
    content = None
    if at and len(at) == len(other) and x.shape == y.shape:
        content = (((g + h) / 2) * (y - x)).sum().item()
    return Pair(
        first=one[0] if one else "",
        second=two[0] if two else "",
        at=at,
        other=other,
        before=before,
        after=after,
        content=content,
        map=None if content is None else after - before - content,
    )
