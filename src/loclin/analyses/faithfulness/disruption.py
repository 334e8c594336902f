"""Disrupt and recover (DPA, 2603.19742) on questions that the model answers: the study and its result."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loclin.analyses.faithfulness.items import Item
from loclin.analyses.faithfulness.scores import ADDITIVE, score_each
from loclin.analyses.faithfulness.zeroing import Zeroing
from loclin.analyses.nearby import Nearby
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, bar, steps, with_progress
from loclin.common.surroundings import in_plain_torch
from loclin.errors import ModelError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.results.provenance import Provenance, versions
from loclin.results.result import Record, Result
from loclin.results.table import make_columns

WRITE_EVERY = 10


@dataclass(frozen=True)
class ItemResult:
    """The measured numbers of one item.

    Attributes
    ----------
    name, prompt, answer: the item.
    known: whether the model's most probable next token begins the answer; the rest is measured only then.
    tokens, positions: the T input tokens' texts, and which of them are the context.
    probability: of the answer's first token.
    logits: its logit, and the same over the mean of all.
    scores: of each token, by method.
    areas: `[disrupt, recover]` by method, in percent: the mean fall of the probability, see `zeroing`.
    """

    name: str
    prompt: str
    answer: str
    known: bool
    tokens: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    probability: float = 0.0
    logits: dict[str, float] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    areas: dict[str, list[float]] = field(default_factory=dict)

    __repr__ = brief

    def missed(self, method: str) -> float:
        """How far the scores of an additive method miss what they are to sum to, relative to it; else NaN.

        A bias's share belongs to no token, so that it counts as missed.
        """
        if not method.startswith(ADDITIVE):
            return math.nan
        value = self.logits["centred" if method.endswith("/centred") else "logit"]
        return abs(math.fsum(self.scores[method]) - value) / abs(value)


@dataclass(frozen=True)
class Disruption(Result):
    """The measured `items`; made by `disruption`. A run goes on where another one of the same settings stopped."""

    settings: dict[str, Any]
    versions: dict[str, str]
    items: list[ItemResult]
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    __repr__ = brief

    @property
    def known(self) -> list[ItemResult]:
        """The items that the model answers."""
        return [item for item in self.items if item.known]

    @property
    def methods(self) -> list[str]:
        """Every method that all known items have."""
        names = [item.areas for item in self.known]
        return [name for name in names[0] if all(name in each for each in names)] if names else []

    def table(self) -> dict[str, list[Any]]:
        """One row per known item and method: both areas, and how far an additive method misses its sum."""
        rows = (
            (item.name, method, *areas, areas[0] - areas[1], item.missed(method))
            for item in self.known
            for method, areas in item.areas.items()
        )
        return make_columns("item method disrupt recover area missed", rows)


@with_progress
def disruption(
    model: Model,
    items: Sequence[Item],
    *,
    source: str = "",
    count: int | None = None,
    bos: bool | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    progress: Progress = True,
) -> Disruption:
    """Measure how well each method's scores say which tokens a right answer needs.

    The tokens of an item's context are sorted by their score. Disrupt: the embeddings of the top p are set to zero.
    Recover: those of all but the top p. p goes from 10 % to 100 %; above 64 tokens the steps crowd at both ends. The
    measure is the fall of the answer's probability in percent of it, mean over p; the area is disrupt less recover.

    Cost of an item of T tokens: see `scores.score_each`, and at most 20 forward passes for each method; sets of zeroed
    tokens that methods share are run once. An item that the model does not answer costs one forward pass.

    Raises ModelError when the input of layer 0 is not the tokens' embeddings alone, or no item is answered; OutputError
    when the file cannot be written, or holds something else.

    Parameters
    ----------
    model: from `loclin.load` or `loclin.wrap`, with a tokenizer.
    items: see `loclin.analyses.faithfulness.items.load_items`.
    source: what the items are, such as the SHA-256 of their file: a run goes on only with the same.
    count: how many answered items to measure, from the first on; all by default.
    bos: whether to put a beginning token in front (see `loclin.linearize`).
    seed: of the random order.
    path: a JSON file, written after every few items.
    fresh: run everything again, and overwrite the file.
    progress: True: bars on a terminal; False: nothing; a function is told what is resumed, or why nothing is.
    """
    model.refuse_other_tasks("the study", "causal")
    whole("seed", seed, 0)
    wanted, tell = len(items) if count is None else whole("items", count, 1), steps(progress)
    settings = {"model": model.info.to_dict(), "bos": bos, "seed": seed, "source": source}
    found, record = Disruption(settings, versions(), []), Record(path, Disruption, fresh)
    earlier = record.resume(found, ("settings", "versions"), tell, "with other settings, items or versions")
    if earlier is not None:
        found = earlier
        tell(f"{path} has {len(found.items)} items, {len(found.known)} of them answered: going on")
    done = {(item.name, item.prompt) for item in found.items}
    known = len(found.known)
    initial = len(found.items) if count is None else min(known, wanted)
    with bar(total=min(wanted, len(items)), initial=initial, unit="item") as progress_bar:
        for item in items:
            if known >= wanted:
                break
            if (item.name, item.prompt) in done:
                continue
            measured = measure(model, item, bos=bos, seed=seed)
            found.items.append(measured)
            known += measured.known
            progress_bar.update(count is None or measured.known)
            if len(found.items) % WRITE_EVERY == 0:
                record.write(found)
    if not found.known:
        raise ModelError(f"{model.info.name} answers none of {len(items)} items: give easier ones, or another model")
    record.write(found)
    return found


@in_plain_torch
def measure(model: Model, item: Item, *, bos: bool | None, seed: int) -> ItemResult:
    """Measure one item."""
    result = ItemResult(item.name, item.prompt, item.answer, known=False)
    ids = model.encode(item.prompt, bos=bos)
    target = item.answer_id(model, ids[0].tolist())
    with torch.no_grad():
        if int(model.hf(input_ids=ids.to(model.device), use_cache=False).logits[0, -1].argmax()) != target:
            return result
    lin = Linearized.at(model, item.prompt, bos=bos)
    positions = item.positions(model, lin.input_ids[0].tolist())
    if len(positions) < 2:
        return result
    nearby = Nearby(lin)
    zeroing = Zeroing(nearby, lin.embeddings, target, positions)
    scores = {
        name: [float(f"{value:.6g}") for value in score.tolist()]
        for name, score in score_each(lin, nearby, zeroing, target, seed).items()
    }
    zeroing.prepare(scores.values())
    logits = lin.trace.logits(lin.trace.target_position(-1)).double()
    (probability,) = zeroing.probabilities([frozenset()])
    return ItemResult(
        item.name,
        item.prompt,
        item.answer,
        known=True,
        tokens=lin.tokens,
        positions=positions,
        probability=probability,
        logits={"logit": logits[target].item(), "centred": (logits[target] - logits.mean()).item()},
        scores=scores,
        areas={name: list(zeroing.areas(score)) for name, score in scores.items()},
    )
