"""Steering with a text's map, measured: what it gains in a concept's words at equal fluency, beside simple baselines.

    python bench/steering.py                          both packaged models, everything (about an hour on one core)
    python bench/steering.py --parts cost             only what it costs to make an operator and to generate with it
    python bench/steering.py --models smollm2-135m    one model

Next-token log-probabilities: a layer is chosen for the methods on 10 packaged prompts and 2 concepts, then every method
is measured on the 40 other prompts and all 10 concepts, at several strengths; methods are compared where their mean KL
divergence from the unsteered prediction is the same. Generation: sampled text at the strength of that KL. Intervals are
95 % bootstrap intervals over prompts and concepts together. All steering is norm-matched: lambda/2 of the hidden
state's norm, at every position; single directions leave the beginning token alone, the attention sink. What is finished
is kept in `bench/results/steering-MODEL.json`, from where the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import loclin
from harness import RESULTS, Row, interleaved, matmul_rate, report, say, show, timed
from loclin import steering as s
from loclin.analyses.steering import depths, score, write
from loclin.linearization import Linearization
from loclin.models import Model
from loclin.output import write_text
from loclin.steering.concepts import Concept, packaged_concepts, token_ids
from loclin.steering.replay import Replay
from models import linear_weights

MODELS = ("smollm2-135m", "gemma-3-270m")
CHOOSING = (0.25, 0.7, 1.5)
MEASURING = (0.2, 0.6, 1.4)
LIMITS = (1.0, 2.0)
"""Nats of mean KL at which methods are compared."""
CHOOSING_CONCEPTS = 2
WRITTEN = {"prompts": 6, "concepts": 2, "seeds": 2, "tokens": 20}
SAMPLES = 2000
RANK = 8


class Case:
    """One concept and one model, and everything that is made of them once."""

    def __init__(self, model: Model, concept: Concept, neutral: dict[str, Linearization]) -> None:
        self.model, self.concept = model, concept
        self.ids = token_ids(model, concept.words)
        self._lins: dict[str, Linearization] = {}
        self._neutral = neutral

    def lin(self, text: str) -> Linearization:
        """The model at a text."""
        held = self._neutral if text in packaged_concepts().neutral else self._lins
        if text not in held:
            held[text] = loclin.linearize(self.model, text, bos=True)
        return held[text]

    def forget(self) -> None:
        """Let go of the concept's own texts and their maps; the neutral ones are every case's."""
        self._lins.clear()
        self.__dict__.pop("own", None)

    @cached_property
    def own(self) -> Linearization:
        """The model at the concept's first text."""
        return self.lin(self.concept.texts[0])

    def shuffled(self) -> list[int]:
        """Another order of that text's tokens."""
        order = torch.randperm(len(self.own.tokens), generator=torch.Generator().manual_seed(0)).tolist()
        return order if order != sorted(order) else order[::-1]


def _point(layer: int) -> str:
    return f"resid_post.{layer}"


def _differences(case: Case, layer: int, last: bool = False) -> s.Vector:
    texts, others = case.concept.texts, packaged_concepts().neutral
    return s.mean_difference(case.model, texts, others, _point(layer), last=last, bos=True)


def _merged(case: Case, layer: int) -> s.Operator:
    return s.merge([s.Operator.make(case.lin(text), layer) for text in case.concept.texts[:2]])


def _less_neutral(case: Case, layer: int) -> s.Operator:
    neutral = s.Operator.make(case.lin(packaged_concepts().neutral[0]), layer)
    return s.merge([s.Operator.make(case.own, layer), neutral], [1.0, -1.0])


def _suffix_of_others(case: Case, layer: int) -> s.Vector:
    """The suffix maps of neutral texts instead of the steering text's own, averaged."""
    found = [s.pullback(case.lin(text), _point(layer), case.ids) for text in packaged_concepts().neutral[:4]]
    return replace(found[0], direction=torch.stack([vector.direction for vector in found]).mean(0))


METHODS: dict[str, Callable[[Case, int], s.Steering]] = {
    "operator (published)": lambda c, layer: s.Operator.make(c.own, layer),
    "operator, first token left alone": lambda c, layer: s.Operator.make(c.own, layer, spare_first=True),
    "operator, final norm on": lambda c, layer: s.Operator.make(c.own, layer, normed=True),
    "operator, shuffled over tokens": lambda c, layer: s.Operator.make(c.own, layer, tokens=c.shuffled()),
    "operator, without the sink's map": lambda c, layer: s.Operator.make(c.own, layer, tokens="words"),
    "operator, rank 8": lambda c, layer: s.Operator.make(c.own, layer, tokens="words", rank=RANK),
    "operator, rank 8, signs fixed": lambda c, layer: s.Operator.make(
        c.own, layer, tokens="words", rank=RANK, signs="fixed"
    ),
    "operator, nearest token": lambda c, layer: s.Operator.make(c.own, layer, align="nearest"),
    "operator, last token's map alone": lambda c, layer: s.Operator.make(c.own, layer, tokens=[-1]),
    "operator, less a neutral text's": _less_neutral,
    "operator, 2 texts": _merged,
    "output basis, rank 8": lambda c, layer: s.output_basis(c.own, _point(layer), RANK),
    "suffix map": lambda c, layer: s.pullback(c.own, _point(layer), c.ids),
    "suffix map of 4 neutral texts": _suffix_of_others,
    "activation addition": lambda c, layer: s.activation_addition(c.own, _point(layer)),
    "mean difference": _differences,
    "mean difference, last tokens": lambda c, layer: _differences(c, layer, last=True),
    "contrast vector": lambda c, layer: s.contrast(
        c.model, packaged_concepts().pairs(c.concept.phrase), _point(layer), bos=True
    ),
    "random direction": lambda c, layer: s.random_direction(c.model, _point(layer)),
}
INTERPOLATED, SEVERAL = "operator, interpolated (eq. 16)", "operator, three layers"
CHOSEN = (
    "operator (published)",
    "operator, less a neutral text's",
    "output basis, rank 8",
    "suffix map",
    "suffix map of 4 neutral texts",
    "activation addition",
    "mean difference",
    "mean difference, last tokens",
    "contrast vector",
    "random direction",
)
"""Methods that have a layer chosen; the operator's other variants take the operator's."""
SHARES = (0.9, 0.8, 0.65, 0.5, 0.3)
ALL = (*METHODS, INTERPOLATED, SEVERAL)
GENERATED = (
    "operator (published)",
    "operator, less a neutral text's",
    "output basis, rank 8",
    "suffix map of 4 neutral texts",
    "activation addition",
    "mean difference",
)


class Record:
    """What is finished, in a file; every piece is written as it comes."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.held: dict[str, Any] = {} if fresh or not path.exists() else json.loads(path.read_text())

    def piece(self, *names: str, make: Callable[[], Any]) -> Any:
        """A piece by its name, made if it is not there yet."""
        key = "/".join(names)
        if key not in self.held:
            self.held[key] = make()
            write_text(self.path, json.dumps(self.held))
        return self.held[key]


def encoded(model: Model, prompts: list[str]) -> list[Tensor]:
    return [model.encode(prompt, bos=True) for prompt in prompts]


def curve(replay: Replay, case: Case, steering: s.Steering, strengths: tuple[float, ...], form: s.Form = "add") -> Any:
    """Gain and KL of every strength and prompt."""
    S = replay.sums(steering)
    found = [score(replay, case.ids, replay.log_probs(steering, strength, form, S)) for strength in strengths]
    return {
        "strength": list(strengths),
        "gain": [[round(x, 4) for x in f.gain.tolist()] for f in found],
        "kl": [[round(x, 4) for x in f.kl.tolist()] for f in found],
    }


def several(replay: Replay, case: Case, strengths: tuple[float, ...]) -> Any:
    """The operator at three layers at once, each with its share of the strength."""
    operators = [s.Operator.make(case.own, layer) for layer in depths(len(case.own.trace.layers))[1:]]
    found = []
    for strength in strengths:
        with ExitStack() as stack:
            for operator in operators[1:]:
                stack.enter_context(operator.apply(case.model, strength / 3))
            found.append(score(replay, case.ids, replay.log_probs(operators[0], strength / 3)))
    return {
        "strength": list(strengths),
        "gain": [[round(x, 4) for x in f.gain.tolist()] for f in found],
        "kl": [[round(x, 4) for x in f.kl.tolist()] for f in found],
    }


def at_limit(gain: np.ndarray, kl: np.ndarray, limit: float) -> float:
    """Gain where a method's mean KL reaches the limit, by straight lines from (0, 0) through its strengths.

    A method whose KL does not get so far has the largest gain that it reached.
    """
    kl, gain = np.concatenate([[0.0], kl]), np.concatenate([[0.0], gain])
    best = gain[kl <= limit].max()
    for i in range(1, len(kl)):
        if (kl[i - 1] - limit) * (kl[i] - limit) < 0:
            share = (limit - kl[i - 1]) / (kl[i] - kl[i - 1])
            best = max(best, gain[i - 1] + share * (gain[i] - gain[i - 1]))
    return float(best)


def strength_at(gain_kl: np.ndarray, strengths: list[float], limit: float) -> float:
    """The smallest strength at which the mean KL reaches the limit; the largest where it does not."""
    kl, strength = np.concatenate([[0.0], gain_kl]), np.concatenate([[0.0], strengths])
    for i in range(1, len(kl)):
        if kl[i] >= limit > kl[i - 1]:
            return float(strength[i - 1] + (limit - kl[i - 1]) / (kl[i] - kl[i - 1]) * (strength[i] - strength[i - 1]))
    return float(strengths[-1])


def choose(record: Record, model: Model, cases: list[Case]) -> dict[str, int]:
    """For each method the layer with the largest mean gain at the first limit, on the prompts for choosing."""
    replay = Replay(model, encoded(model, packaged_concepts().choosing))
    layers = depths(cases[0].own.trace.n_layers)[2:]
    with tqdm(total=len(CHOSEN) * CHOOSING_CONCEPTS * len(layers), desc="choosing layers", unit="cell") as bar:
        for case in cases[:CHOOSING_CONCEPTS]:
            for layer in layers:
                for name in CHOSEN:
                    record.piece(
                        "choose", name, case.concept.name, str(layer),
                        make=lambda m=METHODS[name], c=case, n=layer: curve(replay, c, m(c, n), CHOOSING),
                    )  # fmt: skip
                    bar.update()
                case.own._maps.clear()  # one layer's dense maps at a time
    chosen = {}
    for name in CHOSEN:
        gains = {layer: at_limit(*mean_curve(record, "choose", name, layer), LIMITS[1]) for layer in layers}
        chosen[name] = max(gains, key=gains.__getitem__)
    return dict.fromkeys(ALL, chosen[CHOSEN[0]]) | chosen


def mean_curve(record: Record, part: str, name: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [v for k, v in record.held.items() if k.startswith(f"{part}/{name}/") and k.endswith(f"/{layer}")]
    return tuple(np.mean([np.mean(p[what], axis=1) for p in pieces], axis=0) for what in ("gain", "kl"))


def measure(record: Record, model: Model, cases: list[Case], layers: dict[str, int]) -> None:
    """Every method at its layer, on the prompts for measuring and all concepts."""
    replay = Replay(model, encoded(model, packaged_concepts().measuring))
    with tqdm(total=len(ALL) * len(cases), desc="measuring", unit="curve") as bar:
        for case in cases:
            before = replay.unsteered[:, case.ids].logsumexp(1)
            record.piece("unsteered", case.concept.name, make=lambda b=before: [round(x, 4) for x in b.tolist()])
            for name in ALL:
                layer = layers[name]

                def make(name: str = name, case: Case = case, layer: int = layer) -> Any:
                    if name == SEVERAL:
                        return several(replay, case, MEASURING)
                    if name == INTERPOLATED:
                        return curve(replay, case, s.Operator.make(case.own, layer), SHARES, "interpolate")
                    return curve(replay, case, METHODS[name](case, layer), MEASURING)

                record.piece("measure", name, case.concept.name, str(layer), make=make)
                bar.update()
            record.piece("why", case.concept.name, make=lambda c=case: why(replay, c, layers["operator (published)"]))
            case.forget()


def why(replay: Replay, case: Case, layer: int) -> dict[str, float]:
    """What the published operator adds at the last token of new prompts, compared with what it is on its own text."""
    operator = s.Operator.make(case.own, layer)
    own = case.own.value(_point(layer))[-1]
    S = replay.sums(operator)[:, -1]
    first = operator.push(case.own.embeddings[:1], torch.zeros(1, dtype=torch.long))[0]
    mean = S.mean(0)
    low = s.Operator.make(case.own, layer, tokens="words", rank=RANK)
    assert low.right is not None
    x, index = replay.tokens
    right, steer = low.right[index % len(low.right)], torch.einsum("nkd,nd->nk", low.right, low.embeddings)
    new, steer = torch.einsum("mkd,md->mk", right, x), steer[index % len(low.right)]
    cosine = torch.nn.functional.cosine_similarity
    return {
        "cosine of S with the text's own hidden state": cosine(S, own[None]).mean().item(),
        "share of |S|^2 that is the same for all prompts": (mean.square().sum() / S.square().sum(1).mean()).item(),
        "|J_0 x_0| of the beginning token over |S|": (first.norm() / S.norm(dim=1)).mean().item(),
        "cosine of J_0 x_0 with the text's own hidden state": cosine(first, own, dim=0).item(),
        "share of top-8 coefficients with the text's sign": (new.sign() == steer.sign()).float().mean().item(),
        "size of top-8 coefficients over the text's": (new.abs().mean() / steer.abs().mean()).item(),
    }


def generate(record: Record, model: Model, cases: list[Case], layers: dict[str, int]) -> None:
    """Sampled text at the strength where each method's KL reaches the second limit."""
    prompts = encoded(model, packaged_concepts().measuring[: WRITTEN["prompts"]])
    names = ("unsteered", *GENERATED)
    with tqdm(total=len(names) * WRITTEN["concepts"], desc="writing", unit="batch") as bar:
        for case in cases[: WRITTEN["concepts"]]:
            for name in names:

                def make(name: str = name, case: Case = case) -> Any:
                    steering, strength = None, 0.0
                    if name != "unsteered":
                        steering = METHODS[name](case, layers[name])
                        found = record.held[f"measure/{name}/{case.concept.name}/{layers[name]}"]
                        strength = strength_at(np.mean(found["kl"], axis=1), found["strength"], LIMITS[1])
                    texts = [
                        text
                        for seed in range(WRITTEN["seeds"])
                        for text in write(
                            model, prompts, case.concept.words, steering=steering, strength=strength,
                            max_new_tokens=WRITTEN["tokens"], seed=seed,
                        )
                    ]  # fmt: skip
                    return {
                        "strength": strength,
                        "loss": [t.loss for t in texts],
                        "repetition": [t.repetition for t in texts],
                        "frequency": [t.frequency for t in texts],
                        "text": [t.text for t in texts[:3]],
                    }

                record.piece("write", name, case.concept.name, make=make)
                bar.update()


def bootstrap(gain: np.ndarray, kl: np.ndarray, limit: float) -> tuple[float, float, float]:
    """Gain at a limit and its 95 % interval; `gain` and `kl` are [concepts, strengths, prompts]."""
    random = np.random.default_rng(0)
    concepts, _, prompts = gain.shape
    draws = []
    for _ in range(SAMPLES):
        c, p = random.integers(concepts, size=concepts), random.integers(prompts, size=prompts)
        draws.append(at_limit(gain[c][..., p].mean((0, 2)), kl[c][..., p].mean((0, 2)), limit))
    low, high = np.percentile(draws, [2.5, 97.5])
    return at_limit(gain.mean((0, 2)), kl.mean((0, 2)), limit), float(low), float(high)


def ideal(unsteered: np.ndarray, limit: float) -> float:
    """The gain of the least surprising way there is: P(words) raised to q and nothing else changed, at that mean KL."""
    p = np.exp(unsteered)

    def mean_kl(tilt: float) -> tuple[float, float]:
        q = p * np.exp(tilt) / (p * np.exp(tilt) + 1 - p)
        return float((q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean()), float(np.log(q / p).mean())

    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_kl(middle)[0] < limit else (low, middle)
    return mean_kl(low)[1]


def evaluate(name: str, fresh: bool, n_concepts: int) -> list[Row]:
    model = loclin.load(name)
    record = Record(RESULTS / f"steering-{name}.json", fresh)
    neutral: dict[str, Linearization] = {}
    cases = [Case(model, concept, neutral) for concept in packaged_concepts().concepts[:n_concepts]]
    layers = choose(record, model, cases)
    measure(record, model, cases, layers)
    generate(record, model, cases, layers)
    return tables(name, record, layers)


def tables(name: str, record: Record, layers: dict[str, int]) -> list[Row]:
    """Print what was found for the concepts that are finished, and give it as rows."""
    held, rows, lines = record.held, [], []
    names = [c.name for c in packaged_concepts().concepts if f"why/{c.name}" in held]
    unsteered = np.array([held[f"unsteered/{n}"] for n in names])
    for method in ALL:
        pieces = [held[f"measure/{method}/{n}/{layers[method]}"] for n in names]
        gain, kl = (np.array([p[what] for p in pieces]) for what in ("gain", "kl"))
        cells = [method, "3 of them" if method == SEVERAL else str(layers[method])]
        for limit in LIMITS:
            value, low, high = bootstrap(gain, kl, limit)
            cells.append(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
            rows.append(Row(f"{name}: {method}, gain at KL {limit:g}", value, "nats", f"95 % {low:.2f} to {high:.2f}"))
        found = held.get(f"write/{method}/{names[0]}")
        if found:
            parts = [held[f"write/{method}/{n}"] for n in names[: WRITTEN["concepts"]]]
            cells += written(parts)
        else:
            cells += [""] * 3
        lines.append(cells)
    parts = [held[f"write/unsteered/{n}"] for n in names[: WRITTEN["concepts"]]]
    bound = [f"{ideal(unsteered, limit):+.2f}" for limit in LIMITS]
    lines.append(["best possible at this KL", "", *bound, "", "", ""])
    lines.append(["unsteered", "", "0", "0", *written(parts)])
    title = f"{name}: unsteered log P(words) {unsteered.mean():.2f}; gain at equal KL; sampled text at KL {LIMITS[1]:g}"
    heads = ["method", "layer", *(f"gain, KL {limit:g}" for limit in LIMITS), "words / 100", "loss", "repetition"]
    show(title, heads, lines)
    maps(name, record)
    reasons = [held[f"why/{n}"] for n in names]
    mean = {key: float(np.mean([reason[key] for reason in reasons])) for key in reasons[0]}
    show(f"{name}: what the published operator adds", ["", "mean"], [[k, f"{v:.2f}"] for k, v in mean.items()])
    return rows + [Row(f"{name}: {key}", value, "") for key, value in mean.items()]


def written(parts: list[dict[str, Any]]) -> list[str]:
    """Frequency, loss and repetition of sampled text, with 95 % intervals over concepts and texts."""
    random, cells = np.random.default_rng(0), []
    for what, digits in (("frequency", 1), ("loss", 2), ("repetition", 2)):
        table = np.array([part[what] for part in parts])
        draws = [
            table[random.integers(len(table), size=len(table))][:, random.integers(table.shape[1], size=table.shape[1])]
            for _ in range(SAMPLES)
        ]
        low, high = np.percentile([draw.mean() for draw in draws], [2.5, 97.5])
        cells.append(f"{table.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    return cells


def maps(name: str, record: Record) -> None:
    """Strength by layer, from the prompts for choosing: gain / KL."""
    for method in ("operator (published)", "mean difference"):
        layers = sorted({int(k.rsplit("/", 1)[1]) for k in record.held if k.startswith(f"choose/{method}/")})
        lines = []
        for layer in layers:
            gain, kl = mean_curve(record, "choose", method, layer)
            lines.append([str(layer), *(f"{g:+.2f} / {k:.2f}" for g, k in zip(gain, kl, strict=True))])
        show(f"{name}: {method}, gain / KL by layer and strength", ["layer", *map(str, CHOOSING)], lines)


def cost(name: str, repeats: int) -> list[Row]:
    """Making an operator against the matmul limit of its columns, and generating with it against without."""
    model = loclin.load(name)
    lin = loclin.linearize(model, "The bridge out of Marin is the", bos=True)
    layer, (length, d) = 2 * lin.trace.n_layers // 3 - 1, lin.embeddings.shape
    weights = linear_weights(model.hf) * (layer + 1) / lin.trace.n_layers
    rates, seconds = [matmul_rate()], []
    for _ in range(repeats):
        lin._maps.clear()
        seconds.append(timed(lambda: s.Operator.make(lin, layer)))
        rates.append(matmul_rate())
    limit = 2 * d * length * weights / max(rates)
    rows = [
        Row(
            f"{name}: making an operator, {length} tokens, layer {layer}", min(seconds), "s", "matmul limit",
            min(seconds) / limit, 1.3,
        )
    ]  # fmt: skip
    operator, ids = s.Operator.make(lin, layer), model.encode("Here is a painting of the", bos=True)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}

    def steered(strength: float) -> Tensor:
        with operator.apply(model, strength):
            return model.hf.generate(ids, **options)

    routes = {"plain": lambda: model.hf.generate(ids, **options), "steered": lambda: steered(0.8)}
    runs = interleaved(routes, repeats, name)
    each = {route: run.seconds / 40 for route, run in runs.items()}
    rows.append(
        Row(f"{name}: a steered token", each["steered"], "s", "an unsteered one", each["steered"] / each["plain"], 1.3)
    )
    rows.append(Row(f"{name}: flops of steering a token", 2.0 * d * d, "flop", "2 x weights",
                    d * d / sum(p.numel() for p in model.hf.parameters())))  # fmt: skip
    differing = float((steered(0.0) != routes["plain"]()).sum())
    rows.append(Row(f"{name}: tokens that strength 0 changes", differing, "tokens", demand=0.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=("cost", "evaluation"), choices=("cost", "evaluation"))
    parser.add_argument("--concepts", type=int, default=10, help="only the first so many; more go on from there")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    parser.add_argument("--quick", action="store_true", help="cost alone, one repeat")
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        say(name)
        if "evaluation" in options.parts and not options.quick:
            rows += evaluate(name, options.fresh, options.concepts)
        if "cost" in options.parts:
            rows += cost(name, 1 if options.quick else 5)
    report("steering", rows, options.check)


if __name__ == "__main__":
    main()
