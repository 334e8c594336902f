"""Steering with a text's map, measured: what it gains in a concept's words at equal fluency, beside simple baselines.

    python bench/steering.py                          both packaged models, everything (about an hour on one core)
    python bench/steering.py --parts cost             only what it costs to make an operator and to generate with it
    python bench/steering.py --models smollm2-135m    one model

Next-token log-probabilities: a layer is chosen for the methods on 10 packaged prompts and 2 concepts, then every method
is measured on the 40 other prompts and all concepts, at several strengths; methods are compared where their mean KL
divergence from the unsteered prediction is the same. Generation: sampled text at the strength of that KL. Intervals are
95 % bootstrap intervals over prompts and finished concepts together. All steering is norm-matched: lambda/2 of the
hidden state's norm, at every position; single directions leave the beginning token alone, the attention sink. What is
finished is kept in `bench/results/steering-MODEL.json`, from where the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import loclin
from harness import RESULTS, Row, interleaved, matmul_rate, report, say, timed
from loclin import steering as s
from loclin.linearization import Linearization
from loclin.models import Model
from loclin.results.files import write_text
from loclin.steering.concepts import packaged_concepts
from loclin.steering.replay import Replay
from loclin.steering.search import depths, score
from loclin.steering.writing import write
from models import linear_weights
from steering_figures import LIMITS, STRENGTHS, WRITTEN, Tables, at_limit, mean_curve, strength_at, tables
from steering_methods import (
    ALL,
    CHOSEN,
    EXPLAINED,
    GENERATED,
    INTERPOLATED,
    MAPPED,
    METHODS,
    RANK,
    SEVERAL,
    SHARES,
    Case,
)

MODELS = ("smollm2-135m", "gemma-3-270m")
CHOOSING_CONCEPTS = 2
PARTS = ("cost", "measure", "write")


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
    found = [score(replay.unsteered, case.ids, replay.log_probs(steering, strength, form, S)) for strength in strengths]
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
            found.append(score(replay.unsteered, case.ids, replay.log_probs(operators[0], strength / 3)))
    return {
        "strength": list(strengths),
        "gain": [[round(x, 4) for x in f.gain.tolist()] for f in found],
        "kl": [[round(x, 4) for x in f.kl.tolist()] for f in found],
    }


def choose(record: Record, model: Model, cases: list[Case]) -> dict[str, int]:
    """For each method the layer with the largest mean gain at the second limit, on the prompts for choosing.

    Of the layers at two thirds and at five sixths of the depth; the methods that have a map of strength by layer are
    tried at a third and at half of it too.
    """
    replay = Replay(model, encoded(model, packaged_concepts().choosing))
    *early, late, later = depths(cases[0].own.trace.n_layers)
    tried = {layer: MAPPED for layer in early} | {late: CHOSEN, later: CHOSEN}
    total = CHOOSING_CONCEPTS * sum(map(len, tried.values()))
    with tqdm(total=total, desc="choosing layers", unit="cell") as bar:
        for case in cases[:CHOOSING_CONCEPTS]:
            for layer, names in tried.items():
                for name in names:
                    record.piece(
                        "choose", name, case.concept.name, str(layer),
                        make=lambda m=METHODS[name], c=case, n=layer: curve(replay, c, m(c, n), STRENGTHS),
                    )  # fmt: skip
                    bar.update()
                case.own._maps.clear()  # one layer's dense maps at a time
    chosen = {}
    for name in CHOSEN:
        gains = {layer: at_limit(*mean_curve(record.held, "choose", name, layer), LIMITS[1]) for layer in (late, later)}
        chosen[name] = max(gains, key=gains.__getitem__)
    return dict.fromkeys(ALL, chosen[CHOSEN[0]]) | chosen


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
                        return several(replay, case, STRENGTHS)
                    if name == INTERPOLATED:
                        return curve(replay, case, s.Operator.make(case.own, layer), SHARES, "interpolate")
                    return curve(replay, case, METHODS[name](case, layer), STRENGTHS)

                record.piece("measure", name, case.concept.name, str(layer), make=make)
                bar.update()
            for name in EXPLAINED:
                record.piece(
                    "why", name, case.concept.name, make=lambda n=name, c=case: why(replay, c, METHODS[n](c, layers[n]))
                )
            case.forget()


def why(replay: Replay, case: Case, operator: s.Operator) -> dict[str, float]:
    """What an operator adds at the last token of new prompts, compared with what it is on its own text."""
    J = case.own.jacobian(target=operator.target, normed=operator.normed)
    own, there = J.value, case.own.value(operator.point)[-1]
    S = replay.sums(operator)[:, -1]
    first = operator.push(case.own.embeddings[:1], torch.zeros(1, dtype=torch.long))[0]
    mean = S.mean(0)
    words = [i for i in range(len(case.own.tokens)) if i not in case.own.non_words]
    x, index = replay.tokens
    Vh, index = J.svd(RANK).Vh[words], index % len(words)
    steer = torch.einsum("nkd,nd->nk", Vh, case.own.embeddings[words])[index]
    new = torch.einsum("mkd,md->mk", Vh[index], x)
    cosine = torch.nn.functional.cosine_similarity
    return {
        "cosine of S with what it is on its own text": cosine(S, own[None]).mean().item(),
        "cosine of that with the text's own hidden state where S is added": cosine(own, there, dim=0).item(),
        "share of |S|^2 that is the same for all prompts": (mean.square().sum() / S.square().sum(1).mean()).item(),
        "|J_0 x_0| of the beginning token over |S|": (first.norm() / S.norm(dim=1)).mean().item(),
        "cosine of J_0 x_0 with what S is on its own text": cosine(first, own, dim=0).item(),
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


def evaluate(name: str, options: argparse.Namespace, shown: Tables) -> list[Row]:
    model = loclin.load(name)
    record = Record(RESULTS / f"steering-{name}.json", options.fresh)
    neutral: dict[str, Linearization] = {}
    cases = [Case(model, concept, neutral) for concept in packaged_concepts().concepts[: options.concepts]]
    layers = choose(record, model, cases)
    if "measure" in options.parts:
        measure(record, model, cases, layers)
    if "write" in options.parts:
        generate(record, model, cases, layers)
    return tables(name, record.held, layers, shown)


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
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--concepts", type=int, default=10, help="only the first so many; more go on from there")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    parser.add_argument("--quick", action="store_true", help="cost alone, one repeat")
    parser.add_argument("--check", action="store_true", help="exit 1 when a demand is not met")
    options = parser.parse_args()
    rows, shown = [], Tables()
    for name in options.models:
        say(name)
        if {"measure", "write"} & set(options.parts) and not options.quick:
            rows += evaluate(name, options, shown)
        if "cost" in options.parts:
            rows += cost(name, 1 if options.quick else 5)
    if shown.text:
        write_text(RESULTS / "steering.md", "\n".join(shown.text))
    report("steering", rows, options.check, partly=options.quick or set(options.parts) != set(PARTS))


if __name__ == "__main__":
    main()
