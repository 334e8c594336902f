"""The paper's claims as measurements with thresholds, from the lines of `bench/claims.py`.

A measurement is a number with a 95 % interval over prompts. Where it has a threshold, it is `met` if its whole interval
is on the right side, `missed` if its whole interval is on the wrong side, and else `open`, as it is from fewer than
five prompts. A claim *holds* if every threshold is met. It *does not hold* if one that is the claim itself (`main`) is
missed. Else it holds *partly*. Over several models it holds if it does on each, does not hold if it does on none, even
partly, and else holds partly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loclin.analyses.faithfulness.summary import LEVEL, RESAMPLES, interval, rank_correlations
from loclin.errors import ResultError

Line = dict[str, Any]
Series = dict[str, list[list[float]]]
"""By name, a number of every layer for each prompt."""
Verdict = Literal["holds", "partly", "does not hold"]
Met = Literal["met", "missed", "open"]

FIRST = 10
"""A vector decodes to a word if it is among this many first words, with either sign."""
UNREADABLE = 1000
"""Beyond this rank a word is not to be read from a vector."""
RATE = 2.0
"""Decades of rank between the two."""
LATE = 0.75
"""Depth from which a layer is late."""
FEWEST = 5
"""The smallest number of prompts that decides anything."""


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, how many prompts it is from, and how the interval was made."""

    value: float
    low: float
    high: float
    n: int
    how: str = "bootstrap"


@dataclass(frozen=True)
class Measured:
    """One measurement of a claim; `main`: without it there is no claim. Without a threshold it is shown alone."""

    what: str
    estimate: Estimate
    at_least: float | None = None
    at_most: float | None = None
    main: bool = False
    form: str = ".2g"

    @property
    def met(self) -> Met | None:
        """On which side of the threshold the interval is; None without a threshold."""
        if self.at_least is not None:
            above, below = self.estimate.low >= self.at_least, self.estimate.high < self.at_least
        elif self.at_most is not None:
            above, below = self.estimate.high <= self.at_most, self.estimate.low > self.at_most
        else:
            return None
        if self.estimate.n < FEWEST:
            return "open"
        return "met" if above else "missed" if below else "open"


def judge(measured: Iterable[Measured]) -> Verdict:
    """The verdict on one model."""
    decided = [one for one in measured if one.met is not None]
    if all(one.met == "met" for one in decided):
        return "holds"
    return "does not hold" if any(one.main and one.met == "missed" for one in decided) else "partly"


def join(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over several models."""
    return verdicts[0] if len(set(verdicts)) == 1 else "partly"


def mean(values: Iterable[float]) -> Estimate:
    """A mean over prompts with its bootstrap interval (BCa)."""
    found = interval(list(values))
    return Estimate(found.mean, found.low, found.high, found.n)


def geometric(values: Iterable[float]) -> Estimate:
    """A geometric mean over prompts with its bootstrap interval."""
    return _exp(mean(np.log(list(values))))


def share(hits: Iterable[bool]) -> Estimate:
    """A share of prompts with its Wilson interval."""
    from scipy.stats import binomtest

    hits = list(hits)
    found = binomtest(sum(hits), len(hits)).proportion_ci(LEVEL, method="wilson")
    return Estimate(sum(hits) / len(hits), found.low, found.high, len(hits), "Wilson")


def difference(values: Sequence[float], null: Sequence[float]) -> Estimate:
    """The difference of two means over different prompts or networks, resampled apart."""
    random = np.random.default_rng(0)
    draws = [random.choice(np.asarray(own), (RESAMPLES, len(own))).mean(1) for own in (values, null)]
    low, high = np.percentile(draws[0] - draws[1], [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    n = min(len(values), len(null))
    return Estimate(float(np.mean(values) - np.mean(null)), float(low), float(high), n)


def ratio(values: Iterable[float], null: Iterable[float]) -> Estimate:
    """The ratio of two geometric means, resampled apart."""
    return _exp(difference(np.log(list(values)).tolist(), np.log(list(null)).tolist()))


def _exp(of: Estimate) -> Estimate:
    return Estimate(float(np.exp(of.value)), float(np.exp(of.low)), float(np.exp(of.high)), of.n, of.how)


@dataclass(frozen=True)
class Lines:
    """The lines of one model, by variant (see `claims_measure.VARIANTS`)."""

    model: list[Line]
    layers: list[Line]
    all_tokens: list[Line]
    random: list[Line]
    fresh: list[Line]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Lines:
        """Sort the lines of a file, without its settings; ResultError where a variant is missing."""
        variants = ("model", "layers", "all tokens", "random", "fresh")
        found = [[line for line in lines if line["variant"] == variant] for variant in variants]
        if not all(found):
            missing = ", ".join(variant for variant, own in zip(variants, found, strict=True) if not own)
            raise ResultError(f"there are no lines yet of: {missing}; run bench/claims.py to its end")
        return cls(*found)


def reconstruct(lines: Lines) -> list[Measured]:
    """Claim 1. The paper's "order of 1e-6" is up to 10^-5.5."""
    errors = [line["std_error"] for line in lines.model]
    return [
        Measured("the paper's error, std of the error over std of the output", mean(errors), at_most=3e-6, main=True),
        Measured("prompts on which that is at most 3e-6", share(e <= 3e-6 for e in errors), at_least=0.9),
        Measured(
            "the largest error of one number, over the output's largest number",
            mean(line["max_error"] for line in lines.model),
            at_most=1e-5,
            main=True,
        ),
        Measured(
            "the dense map: norm of the error over norm of the output",
            mean(line["dense_error"] for line in lines.all_tokens),
        ),
    ]


def differentiate(lines: Lines) -> list[Measured]:
    """Claim 2."""
    errors = [line["ordinary_error"] for line in lines.model]
    times = [line["ordinary_error"] / line["std_error"] for line in lines.model]
    return [
        Measured(
            "prompts on which its error is at least 0.1", share(e >= 0.1 for e in errors), at_least=0.9, main=True
        ),
        Measured("the paper's error of the ordinary Jacobian", mean(errors)),
        Measured("the same over that of the frozen map (geometric mean)", geometric(times), at_least=1e3, form=".1e"),
    ]


def words_of(line: Line) -> list[int]:
    """Positions of words: not the beginning token, nor another attention sink."""
    return [i for i in range(len(line["tokens"])) if i not in line["non_words"]]


def typical_rank(line: Line) -> float:
    """The geometric mean of the stable ranks of the words' maps."""
    return float(np.exp(np.mean(np.log([line["stable_rank"][i] for i in words_of(line)]))))


def last_rank(line: Line) -> float:
    """The stable rank of the last token's map."""
    return float(line["layer_rank"][-1])


def count_dimensions(lines: Lines) -> list[Measured]:
    """Claim 3."""
    width = lines.model[0]["width"]
    own, random, fresh = ([last_rank(line) for line in part] for part in (lines.layers, lines.random, lines.fresh))
    words = [typical_rank(line) for line in lines.all_tokens]
    return [
        Measured("last token's map: stable rank over d", geometric(r / width for r in own), at_most=0.05, main=True),
        Measured("maps of all words: stable rank over d", geometric(r / width for r in words), at_most=0.05, main=True),
        Measured("last token's map: over that of random weights", ratio(own, random), at_most=0.5),
        Measured("last token's map: over that of fresh weights", ratio(own, fresh), at_most=0.5),
        Measured("last token's map: stable rank", geometric(own)),
        Measured("maps of all words: stable rank", geometric(words)),
        Measured("beginning token's map: stable rank", geometric(line["stable_rank"][0] for line in lines.all_tokens)),
        Measured("all tokens side by side: stable rank", geometric(map(last_rank, lines.all_tokens))),
    ]


def same_word(one: str, other: str) -> bool:
    """Whether two tokens are the same word, but for case and the space before it."""
    return one.strip().casefold() == other.strip().casefold()


def writes(vector: Line, word: str) -> bool:
    """Whether a word is among the first words of a vector, with either sign."""
    defined = vector["word_rank"] is not None
    return defined and any(same_word(word, found) for side in vector["words"] for found in side)


def own_vectors(line: Line) -> list[Line]:
    """The first left vectors of the words' maps."""
    return [line["each"][i] for i in words_of(line)]


def hits(vectors: Sequence[Line], word: str) -> float:
    """The share of vectors that write a word."""
    return float(np.mean([writes(vector, word) for vector in vectors]))


def beyond(lines: Sequence[Line], vectors: Callable[[Line], list[Line]]) -> Estimate:
    """How much more often vectors write their own prompt's prediction than those of the other prompts."""
    found = []
    for line in lines:
        others = [other["target"] for other in lines if not same_word(other["target"], line["target"])]
        strangers = [hits(vectors(line), word) for word in others]
        found.append(hits(vectors(line), line["target"]) - (float(np.mean(strangers)) if strangers else 0.0))
    return mean(found)


def decode(lines: Lines) -> list[Measured]:
    """Claim 4."""
    own, ends, each = lines.model, lines.layers, lines.all_tokens
    whole = share(writes(line["whole"], line["target"]) for line in own)
    last = share(writes(line["last"], line["target"]) for line in ends)
    words = mean(hits(own_vectors(line), line["target"]) for line in each)
    chance = mean(float(np.mean([rank <= FIRST for rank in line["whole"]["random_rank"]])) for line in own)
    return [
        Measured("all tokens side by side: prompts whose vector writes the prediction", whole, at_least=0.5, main=True),
        Measured(
            "all tokens side by side: this, less how often it writes other prompts' predictions",
            beyond(own, lambda line: [line["whole"]]),
            at_least=0.25,
        ),
        Measured(
            "all tokens side by side: prompts whose vector's very first word it is",
            share(line["whole"]["word_rank"] == 1 for line in own),
        ),
        Measured("last token: prompts whose vector writes the prediction", last, at_least=0.5),
        Measured(
            "last token: this, less how often it writes other prompts' predictions",
            beyond(ends, lambda line: [line["last"]]),
            at_least=0.25,
        ),
        Measured("all words: share of their vectors that write the prediction", words, at_least=1 / 3),
        Measured("random directions: share that write it", chance),
    ]


def fall(line: Line) -> float:
    """The rank correlation (Spearman) of the stable rank with depth."""
    return rank_correlations(line["layer_rank"], range(len(line["layer_rank"])))[0]


def change(line: Line) -> float:
    """The stable rank at the last layer over that at the first."""
    return line["layer_rank"][-1] / line["layer_rank"][0]


def descend(lines: Lines) -> list[Measured]:
    """Claim 5."""
    own, whole = lines.layers, lines.all_tokens
    steeper = ratio(map(change, own), map(change, lines.random))
    return [
        Measured("all tokens: rank correlation with depth", mean(map(fall, whole)), at_most=-0.8, main=True),
        Measured("last token: rank correlation with depth", mean(map(fall, own)), at_most=-0.8, main=True),
        Measured("all tokens: last layer's stable rank over the first's", geometric(map(change, whole)), at_most=0.5),
        Measured("last token: last layer's stable rank over the first's", geometric(map(change, own)), at_most=0.5),
        Measured("last token: this, over the same of random weights", steeper, at_most=0.5),
        Measured("random weights: rank correlation with depth", mean(map(fall, lines.random))),
        Measured("fresh weights: rank correlation with depth", mean(map(fall, lines.fresh))),
    ]


def peak(line: Line) -> float:
    """The depth of the layer whose own map has the largest stable rank: 0 the first, 1 the last."""
    return float(np.argmax(line["own_rank"]) / (len(line["own_rank"]) - 1))


def peak_late(lines: Lines) -> list[Measured]:
    """Claim 6."""
    depths = [peak(line) for line in lines.layers]
    heights = [max(line["own_rank"]) / float(np.median(line["own_rank"])) for line in lines.layers]
    after = [line["own_rank"][-1] / max(line["own_rank"]) for line in lines.layers]
    return [
        Measured(
            "prompts with the peak in the last quarter", share(d >= LATE for d in depths), at_least=0.5, main=True
        ),
        Measured("the peak over the median layer", geometric(heights), at_least=2.0),
        Measured(
            "depth of the peak, less that of random weights",
            difference(depths, [peak(line) for line in lines.random]),
            at_least=0.1,
        ),
        Measured("depth of the peak (0: the first layer, 1: the last)", mean(depths)),
        Measured("depth of the peak, random weights", mean(map(peak, lines.random))),
        Measured("the last layer over the peak", geometric(after)),
    ]


def transition(ranks: Sequence[int]) -> tuple[int, int] | None:
    """The first layer at which a word has rank 1000 or better, and that from which it stays among the first ten.

    None if it is readable from the first layer on, or is not among the first ten at the last.
    """
    if ranks[-1] > FIRST or ranks[0] <= UNREADABLE:
        return None
    begins = next(layer for layer, rank in enumerate(ranks) if rank <= UNREADABLE)
    return begins, max(layer + 1 for layer, rank in enumerate(ranks) if rank > FIRST)


def width(ranks: Sequence[int]) -> float | None:
    """How many layers the transition takes, one if it is a single step; None without a transition."""
    found = transition(ranks)
    return None if found is None else found[1] - found[0] + 1.0


def shuffled_width(ranks: Sequence[int]) -> float:
    """The mean of the same over random orders of the layers before the last."""
    orders = (np.random.default_rng(seed).permutation(np.asarray(ranks[:-1])).tolist() for seed in range(20))
    widths = _known(width([*order, ranks[-1]]) for order in orders)
    return float(np.mean(widths)) if widths else float(len(ranks))


def steady_width(ranks: Sequence[int]) -> float:
    """What the transition would take if log rank fell along a straight line, from its largest to 1."""
    return RATE / float(np.log10(max(ranks))) * len(ranks)


def switch(lines: Lines) -> list[Measured]:
    """Claim 7."""
    ranks = [line["layer_word"] for line in lines.all_tokens]
    found = [(one, pair) for one in ranks if (pair := transition(one)) is not None]
    last = [transition(line["layer_word"]) is not None for line in lines.layers]
    shown = [
        Measured(
            "all tokens: prompts on which the prediction becomes readable, and stays",
            share(transition(one) is not None for one in ranks),
            at_least=0.5,
            main=True,
        ),
        Measured("last token: prompts on which the prediction becomes readable, and stays", share(last), at_least=0.5),
    ]
    if not found:
        return shown
    takes = [end - begin + 1.0 for _, (begin, end) in found]
    parts = [steps / steady_width(one) for steps, (one, _) in zip(takes, found, strict=True)]
    depths = [end / (len(one) - 1) for one, (_, end) in found]
    mixed = [shuffled_width(one) for one, _ in found]
    shown += [
        Measured(
            "all tokens: layers that this takes, over those of a steady fall", mean(parts), at_most=0.5, main=True
        ),
        Measured("all tokens: depth from which it stays (1: the last layer)", mean(depths), at_least=0.5),
        Measured("all tokens: layers that this takes", mean(takes)),
        Measured("all tokens: layers that this takes in a random order", mean(mixed)),
    ]
    lens = _known(width(line["lens"]) for line in lines.layers)
    return shown + ([Measured("logit lens: layers that this takes", mean(lens))] if lens else [])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def rank_series(lines: Lines) -> Series:
    """Stable ranks of the maps to each layer."""
    parts = {
        "all tokens": lines.all_tokens,
        "last token": lines.layers,
        "last token, random weights": lines.random,
        "last token, fresh weights": lines.fresh,
    }
    return {name: [line["layer_rank"] for line in of] for name, of in parts.items()}


def own_series(lines: Lines) -> Series:
    """Stable ranks of each layer's own map."""
    parts = {"trained": lines.layers, "random weights": lines.random, "fresh weights": lines.fresh}
    return {name: [line["own_rank"] for line in of] for name, of in parts.items()}


def word_series(lines: Lines) -> Series:
    """Ranks of the predicted word."""
    return {
        "all tokens": [line["layer_word"] for line in lines.all_tokens],
        "last token": [line["layer_word"] for line in lines.layers],
        "logit lens": [line["lens"] for line in lines.layers],
    }


@dataclass(frozen=True)
class Claim:
    """One claim: what the paper says and where, what is measured, the function that does it, and numbers by layer."""

    title: str
    says: str
    tested: str
    measure: Callable[[Lines], list[Measured]]
    by_depth: Callable[[Lines], Series] | None = None


CLAIMS = (
    Claim(
        "Near-exact reconstruction",
        "The frozen (“detached”) Jacobian times the embeddings reproduces the output embedding “nearly exactly”, "
        "with a relative error of the order of 1e-6 in float32 (sections 2.2 and 3.1, Figure 3).",
        "J x + b in float32 against the network's own output, with the paper's error and with the largest "
        "error of a single number.",
        reconstruct,
    ),
    Claim(
        "The ordinary Jacobian does not reconstruct",
        "The same comparison with the original Jacobian “does not fall on the identity line” (section 3.1, Figure 3).",
        "The ordinary Jacobian times the embeddings, with the paper's error: 0 is exact, 1 is as bad as a constant.",
        differentiate,
    ),
    Claim(
        "Very low rank",
        "The singular value spectra of the tokens' maps are “extremely low rank” (sections 3.3 and 3.4, Figures 4 "
        "and 5).",
        "The stable rank ‖J‖²/σ₁² of tokens' maps from the embedding to the final hidden state: of the last token "
        "on all prompts, of all tokens on few. Null models: random and fresh weights.",
        count_dimensions,
    ),
    Claim(
        "The first left singular vectors decode to the prediction",
        "Many of the largest singular vectors “decode to concepts related to the most-likely output token” (abstract, "
        "sections 3.3 and 3.4, Figures 4B and 5).",
        "Whether the predicted word, whatever its case, is among the first ten words of a map's first left vector, "
        "with either sign: of the map of all tokens side by side, of the last token's map, and on few prompts of "
        "every word's. Vectors of single tokens that near-equal singular values leave undefined count as no. Null "
        "models: the predictions of other prompts in the same vectors; random directions.",
        decode,
    ),
    Claim(
        "Dimension falls with depth",
        "The dimensionality of the map from the embeddings up to a layer “steadily decreases” with the layer (section "
        "3.5, Figure 6C).",
        "The stable rank of the map to every layer's output, with the final norm on top: of all tokens side by "
        "side, as in the paper, on few prompts, and of the last token on all. Null models: random and fresh "
        "weights.",
        descend,
        rank_series,
    ),
    Claim(
        "The dimension of single layers peaks late",
        "Each layer taken as its own transform shows “a large peak in dimensionality near the end” (section 3.5, "
        "Figure 6D).",
        "The stable rank of each layer's own map, from all tokens at its input, side by side, to the last one at its "
        "output, with the final norm on top. The peak is the layer where it is largest. Null model: random weights.",
        peak_late,
        own_series,
    ),
    Claim(
        "Words appear as at a phase change",
        "Early layers cannot be read, and intelligible words emerge in later ones as “something like a phase change” "
        "(section 3.5, Tables 1 to 3).",
        "The predicted word's rank among the words of the first left vector of the map to every layer, with the better "
        "sign. The transition begins at the first layer with rank 1000 or better, and ends at the layer from which the "
        "word stays among the first ten. For comparison: a steady fall of log rank over all layers, the layers in a "
        "random order, and the logit lens.",
        switch,
        word_series,
    ),
)
