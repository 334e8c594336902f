"""The study of one model: every prompt measured, written as it goes, and gone on with when it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.analyses.faithfulness import methods
from loclin.analyses.faithfulness.deletion import Removal, ranked, replaced
from loclin.analyses.faithfulness.planes import Projected, projections
from loclin.analyses.faithfulness.prompts import Half, Prompt
from loclin.analyses.nearby import Nearby
from loclin.common.access import reason
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.errors import ModelError, OutputError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.results.files import write_text
from loclin.results.result import versions

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
"""The methods whose order tokens are removed in."""
_KIND = "loclin faithfulness"


@dataclass(frozen=True)
class PromptResult:
    """One prompt's numbers; what is made of them is made later.

    Attributes
    ----------
    kind, text, half
        The prompt (see `loclin.analyses.faithfulness.prompts`).
    tokens
        The input tokens' texts, T of them.
    sinks
        Positions that no ranking has: attention sinks, and the beginning token.
    target, probability
        The token that the model predicts, and how sure it is.
    shares
        Each method's number for each token, by the method's name.
    effects
        How far the target's log-probability falls when one token is `removed`, or `replaced` by the mean embedding.
    curves
        How far it falls as tokens are removed in an order, by test and by method: `first` removes the tokens with the
        largest shares first, `last` those with the smallest; both keep the last token. `first, all` may remove it.
    planes
        The input projected off singular and off random planes.
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

    @classmethod
    def from_dict(cls, read: dict[str, Any]) -> PromptResult:
        """Take back what `dataclasses.asdict` gave."""
        return cls(**read | {"planes": [Projected(**plane) for plane in read["planes"]]})


@dataclass(frozen=True)
class Study:
    """The prompts measured so far, and how: `settings` and `versions` are what a run must share to go on with it."""

    settings: dict[str, Any]
    versions: dict[str, str]
    prompts: list[PromptResult]

    __repr__ = brief

    def to_json(self) -> str:
        """The study as JSON text; floats that are not finite do not occur."""
        record = {"kind": _KIND} | asdict(self)
        return json.dumps(record, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Study:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            When the text is anything else.
        """
        try:
            read = json.loads(text)
            if read["kind"] != _KIND:
                raise ValueError("it is another kind of record")
            prompts = [PromptResult.from_dict(prompt) for prompt in read["prompts"]]
            return cls(dict(read["settings"]), dict(read["versions"]), prompts)
        except (KeyError, TypeError, AttributeError) as fault:
            raise ValueError("it is another kind of record") from fault


def read(path: Path) -> Study | None:
    """Read an earlier run's study; None where there is no file.

    Raises
    ------
    OutputError
        When the file cannot be read or is no study: it is left as it is.
    """
    try:
        return Study.from_json(path.read_text("utf-8")) if path.is_file() else None
    except OSError as fault:
        raise OutputError(f"cannot read {path}: {reason(fault, path)}") from fault
    except ValueError as fault:
        raise OutputError(f"{path} is no study to go on with ({fault}); name another file, or use --fresh") from fault


def study(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    bos: bool | None = None,
    seed: int = 0,
    path: Path | None = None,
    fresh: bool = False,
    planes: int = 16,
    progress: Progress = silent,
) -> Study:
    """Measure shares, single-token effects, deletion curves and projections on every prompt.

    Integrated gradients, deletion curves and projections are of the held-out half only; on the other half, which comes
    first, settings are chosen, for which rank correlations do.

    Parameters
    ----------
    model
        From `loclin.load` or `loclin.wrap`, with a tokenizer.
    prompts
        See `loclin.analyses.faithfulness.prompts.load`.
    bos
        A beginning token in front (see `loclin.linearize`).
    seed
        Of random orders and planes.
    path
        A JSON file that gets the prompts every few of them. Those it holds already, of the same settings and versions,
        are not run again.
    fresh
        Run everything again, and write over the file whatever it holds.
    planes
        On how many prompts to project, which needs the dense map.
    progress
        Told what is gone on with, or why nothing is.

    Raises
    ------
    ModelError
        When what enters layer 0 is not simply the tokens' embeddings, so that there is no mean one to put there.
    OutputError
        When the file cannot be written, or holds something else.

    Notes
    -----
    Cost of a prompt of T tokens: twelve columns, about 2 T + 10 forward passes and 4 backward; on the held-out half
    16 of both more, and about 18 T forward passes of half the length; with planes the dense map and 109 more.
    """
    whole("planes", planes, 0)
    whole("seed", seed, 0)
    captum = find_spec("captum") is not None
    if not captum:
        progress('no integrated gradients: captum is not installed (pip install "loclin[faithfulness]")')
    settings = {"model": model.info.to_dict(), "bos": bos, "seed": seed, "planes": planes, "captum": captum}
    found = Study(settings, versions(), [])
    earlier = read(path) if path is not None and not fresh else None
    if earlier is not None and (earlier.settings, earlier.versions) != (found.settings, found.versions):
        progress(f"{path} was written with other settings or versions: starting over")
    elif earlier is not None:
        found = earlier
        progress(f"{path} has {len(found.prompts)} prompts: going on")
    done = {prompt.text for prompt in found.prompts}
    held_out = [prompt.text for prompt in prompts if prompt.half == "held-out"]
    mean = mean_embedding(model)
    rest = sorted((prompt for prompt in prompts if prompt.text not in done), key=lambda prompt: prompt.half)
    with tqdm(total=len(prompts), initial=len(prompts) - len(rest), unit="prompt", leave=False, disable=None) as bar:
        for number, prompt in enumerate(rest, start=1):
            projected = prompt.text in held_out[:planes]
            found.prompts.append(measure(model, prompt, mean, bos=bos, seed=seed, planes=projected))
            if path is not None and (number % WRITE_EVERY == 0 or number == len(rest)):
                write_text(path, found.to_json())
            bar.update()
    wanted = {prompt.text for prompt in prompts}
    return Study(found.settings, found.versions, [prompt for prompt in found.prompts if prompt.text in wanted])


def measure(
    model: Model, prompt: Prompt, mean: Float[Tensor, " d"], *, bos: bool | None, seed: int, planes: bool
) -> PromptResult:
    """Everything about one prompt."""
    lin = Linearized.at(model, prompt.text, bos=bos)
    mean = mean.to(lin.embeddings)
    if not torch.allclose(lin.embeddings, _embedded(model, lin.input_ids)[0].to(lin.embeddings), rtol=1e-4, atol=1e-6):
        raise ModelError(f"{model.info.name}: the study needs a model whose layer 0 takes the tokens' embeddings alone")
    nearby = Nearby(lin)
    ((target, text, probability),) = lin.next_token_ids(1)
    held_out, left_out = prompt.half == "held-out", _left_out(lin)
    shares = methods.frozen(lin, mean) | methods.gradient(lin, nearby, mean) | methods.simple(lin)
    if held_out:
        shares |= methods.integrated_gradients(lin, nearby, mean, left_out)
    numbers = {name: [float(f"{value:.6g}") for value in share.tolist()] for name, share in shares.items()}
    removal = Removal(nearby, lin.input_ids, target)
    effects = {"removed": removal.single(), "replaced": replaced(nearby, lin.embeddings, target, mean)}
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
        curves=_curves(removal, numbers, left_out, len(lin.tokens), seed) if held_out else {},
        planes=projections(lin, nearby, target, seed) if planes else [],
    )


def _curves(
    removal: Removal, shares: dict[str, list[float]], left_out: list[int], length: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Remove tokens in the order of each method, and in random ones."""
    scores = {name: shares[name] for name in DELETED if name in shares}
    random = np.random.default_rng(seed)
    scores |= {f"random {number}": random.random(length).tolist() for number in range(1, RANDOM_ORDERS + 1)}
    words = [i for i in range(length) if i not in left_out]
    before = [i for i in words if i != length - 1]
    orders = {
        test: {name: ranked([sign * value for value in score], chosen) for name, score in scores.items()}
        for test, sign, chosen in (("first", 1, before), ("last", -1, before), ("first, all", 1, words))
    }
    removal.prepare(order for found in orders.values() for order in found.values())
    return {test: {name: removal.curve(order) for name, order in found.items()} for test, found in orders.items()}


def _left_out(lin: Linearized) -> list[int]:
    """Attention sinks, and the beginning token also where it is none."""
    first = int(lin.input_ids[0, 0])
    begins = {0} if lin.model.bos is not None and first == lin.model.bos and len(lin.tokens) > 1 else set()
    return sorted(begins | set(lin.sinks))


def mean_embedding(model: Model) -> Float[Tensor, " d"]:
    """The mean of all tokens' embeddings, as they enter layer 0. Cost: the embedding table, once more."""
    vocabulary = cast("Tensor", model.hf.get_input_embeddings().weight).shape[0]
    return _embedded(model, torch.arange(vocabulary, device=model.device)).float().mean(0)


@torch.no_grad()
def _embedded(model: Model, ids: Tensor) -> Tensor:
    found: Tensor = model.hf.get_input_embeddings()(ids)
    return found
