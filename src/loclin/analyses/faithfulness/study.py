"""The study of one model: measures every prompt, saves results as it runs, and resumes an interrupted run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.faithfulness import methods
from loclin.analyses.faithfulness.deletion import Removal, rank_positions, replace_each
from loclin.analyses.faithfulness.planes import Projected, project
from loclin.analyses.faithfulness.prompts import Half, StudyPrompt
from loclin.analyses.nearby import Nearby
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, bar, steps, with_progress
from loclin.errors import ModelError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.results.provenance import Provenance, versions
from loclin.results.result import Record, Result
from loclin.results.table import make_columns

WRITE_EVERY = 4
RANDOM_ORDERS = 2
DELETED = (
    "frozen/activation/logit/zero",
    "frozen/half/centred/zero",
    "gradient/logit/zero",
    "integrated/log-probability/mean",
    "attention received",
    "last first",
)
"""The methods by whose scores tokens are removed one after another."""


@dataclass(frozen=True)
class PromptResult:
    """The measured numbers of one prompt; tables are made from them later.

    Attributes
    ----------
    kind, text, half, tokens: the prompt (see `loclin.analyses.faithfulness.prompts`), and its T input tokens' texts.
    sinks: positions that are left out of rankings: attention sinks, and the beginning token.
    target, probability: the token that the model predicts, and its probability.
    shares: the score of each token, by method.
    effects: how far the target's log-probability falls, in nats, if one token is `removed`, or `replaced` by the mean
        embedding.
    curves: how far it falls as tokens are removed one after another, by test and method. `first` removes the tokens
        with the largest shares first, `last` those with the smallest; both keep the last token. `first, all` may remove
        it, too.
    planes: projections of singular vectors, and of random subspaces, out of the input.
    """

    kind: str
    text: str
    half: Half
    tokens: list[str]
    sinks: list[int]
    target: str
    probability: float
    shares: dict[str, list[float]]
    effects: dict[str, list[float]]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    planes: list[Projected] = field(default_factory=list)

    __repr__ = brief


@dataclass(frozen=True)
class Faithfulness(Result):
    """The measured `prompts`; made by `faithfulness`. A run resumes another one if settings and versions are equal."""

    settings: dict[str, Any]
    versions: dict[str, str]
    prompts: list[PromptResult]
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per prompt, token and method: the share, and the effect of removing or replacing the token."""
        rows = (
            (number, prompt.half, method, i, prompt.tokens[i], i in prompt.sinks, *numbers)
            for number, prompt in enumerate(self.prompts)
            for method, shares in prompt.shares.items()
            for i, numbers in enumerate(zip(shares, prompt.effects["removed"], prompt.effects["replaced"], strict=True))
        )
        return make_columns("prompt half method token text sink share removed replaced", rows)


@with_progress
def faithfulness(
    model: Model,
    prompts: Sequence[StudyPrompt],
    *,
    bos: bool | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    planes: int = 16,
    progress: Progress = True,
) -> Faithfulness:
    """Measure shares, single-token effects, deletion curves and projections on every prompt.

    Integrated gradients, deletion curves and projections are measured on the held-out half only. Settings are chosen on
    the other half, which is measured first and needs only rank correlations.

    Cost of a prompt of T tokens: twelve columns, about 2 T + 10 forward passes and 4 backward passes. On the held-out
    half, 16 more of both, and about 18 T forward passes of half the length; with projections the dense map and 109 more
    passes.

    Raises ModelError when the input of layer 0 is not simply the tokens' embeddings, so that a mean embedding cannot
    replace it; OutputError when the file cannot be written, or holds something else.

    Parameters
    ----------
    model: from `loclin.load` or `loclin.wrap`, with a tokenizer.
    prompts: see `loclin.analyses.faithfulness.prompts.load_prompts`.
    bos: whether to put a beginning token in front (see `loclin.linearize`).
    seed: the seed of random orders and subspaces.
    path: a JSON file, written after every few prompts. Prompts that it already has, with the same settings and
        versions, are not run again.
    fresh: run everything again, and overwrite the file.
    planes: the number of prompts on which to measure projections, which need the dense map.
    progress: True: bars on a terminal; False: nothing; a function is told what is resumed, or why nothing is.
    """
    model.refuse_other_tasks("the study", "causal")
    whole("planes", planes, 0)
    whole("seed", seed, 0)
    captum, tell = find_spec("captum") is not None, steps(progress)
    if not captum:
        tell('no integrated gradients: captum is not installed (pip install "loclin[faithfulness]")')
    settings = {"model": model.info.to_dict(), "bos": bos, "seed": seed, "planes": planes, "captum": captum}
    found = Faithfulness(settings, versions(), [])
    record = Record(path, Faithfulness, fresh)
    earlier = record.resume(found, ("settings", "versions"), tell, "with other settings or versions")
    if earlier is not None:
        found = earlier
        tell(f"{path} has {len(found.prompts)} prompts: resuming")
    done = {prompt.text for prompt in found.prompts}
    held_out = [prompt.text for prompt in prompts if prompt.half == "held-out"]
    mean = mean_embedding(model)
    rest = sorted((prompt for prompt in prompts if prompt.text not in done), key=lambda prompt: prompt.half)
    with bar(total=len(prompts), initial=len(prompts) - len(rest), unit="prompt") as progress_bar:
        for number, prompt in enumerate(rest, start=1):
            projected = prompt.text in held_out[:planes]
            found.prompts.append(measure(model, prompt, mean, bos=bos, seed=seed, planes=projected))
            if number % WRITE_EVERY == 0 or number == len(rest):
                record.write(found)
            progress_bar.update()
    wanted = {prompt.text for prompt in prompts}
    return replace(found, prompts=[prompt for prompt in found.prompts if prompt.text in wanted])


def measure(
    model: Model, prompt: StudyPrompt, mean: Float[Tensor, " d"], *, bos: bool | None, seed: int, planes: bool
) -> PromptResult:
    """Measure one prompt."""
    lin = Linearized.at(model, prompt.text, bos=bos)
    mean = mean.to(lin.embeddings)
    if not torch.allclose(lin.embeddings, _embed(model, lin.input_ids)[0].to(lin.embeddings), rtol=1e-4, atol=1e-6):
        raise ModelError(
            f"{model.info.name}: the study needs a model whose layer 0 takes the tokens' embeddings alone; use another"
        )
    nearby = Nearby(lin)
    ((target, text, probability),) = lin.next_token_ids(1)
    held_out, left_out = prompt.half == "held-out", lin.non_words
    shares = methods.frozen(lin, mean) | methods.gradient(lin, nearby, mean) | methods.simple(lin)
    if held_out:
        shares |= methods.integrated_gradients(lin, nearby, mean, left_out)
    numbers = {name: [float(f"{value:.6g}") for value in share.tolist()] for name, share in shares.items()}
    removal = Removal(nearby, lin.input_ids, target)
    effects = {"removed": removal.single(), "replaced": replace_each(nearby, lin.embeddings, target, mean)}
    return PromptResult(
        prompt.kind,
        prompt.text,
        prompt.half,
        tokens=lin.tokens,
        sinks=left_out,
        target=text,
        probability=probability,
        shares=numbers,
        effects={name: effect.tolist() for name, effect in effects.items()},
        curves=_measure_curves(removal, numbers, left_out, len(lin.tokens), seed) if held_out else {},
        planes=project(lin, nearby, target, seed) if planes else [],
    )


def _measure_curves(
    removal: Removal, shares: dict[str, list[float]], left_out: list[int], length: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Remove tokens in the order of each method, and in random orders."""
    scores = {name: shares[name] for name in DELETED if name in shares}
    random = np.random.default_rng(seed)
    scores |= {f"random {number}": random.random(length).tolist() for number in range(1, RANDOM_ORDERS + 1)}
    words = [i for i in range(length) if i not in left_out]
    before = [i for i in words if i != length - 1]
    orders = {
        test: {name: rank_positions([sign * value for value in score], chosen) for name, score in scores.items()}
        for test, sign, chosen in (("first", 1, before), ("last", -1, before), ("first, all", 1, words))
    }
    removal.prepare(order for found in orders.values() for order in found.values())
    return {test: {name: removal.curve(order) for name, order in found.items()} for test, found in orders.items()}


def mean_embedding(model: Model) -> Float[Tensor, " d"]:
    """Compute the mean of all tokens' embeddings, as they enter layer 0. Memory: a second embedding table."""
    vocabulary = cast("Tensor", model.hf.get_input_embeddings().weight).shape[0]
    return _embed(model, torch.arange(vocabulary, device=model.device)).float().mean(0)


@torch.no_grad()
def _embed(model: Model, ids: Tensor) -> Tensor:
    found: Tensor = model.hf.get_input_embeddings()(ids)
    return found
