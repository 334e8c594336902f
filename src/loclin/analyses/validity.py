"""How far from its prompt the frozen map still predicts the model: in random directions, and towards other tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loclin.analyses.decode import Decoder
from loclin.analyses.nearby import Nearby, Outputs
from loclin.common.arguments import real, whole
from loclin.common.brief import brief
from loclin.common.sums import relative
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.network.link import HeadLink
from loclin.results.result import versions

SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Lengths of random moves, as a share of each token's embedding."""
WAY = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""Places on the way from a token's embedding to another's."""
PREDICTORS = ("frozen", "ordinary", "constant")


@dataclass(frozen=True)
class Error:
    """How well the model is predicted at a moved input; means where several are put together.

    Attributes
    ----------
    final
        |predicted - true| / |true| of the final hidden state.
    missed
        |predicted - true| / |true - y|: the part of the true change that is not predicted; 1 for predicting none.
    kl
        The divergence in nats of the predicted next-token probabilities from the true ones.
    top
        Whether both name the same likeliest token: 1 or 0.
    """

    final: float
    missed: float
    kl: float
    top: float


@dataclass(frozen=True)
class Step:
    """One place on a ray.

    Attributes
    ----------
    size
        How far along the ray.
    moved
        |x' - x| / |x| over all tokens.
    errors
        By predictor: `frozen`, J x' + b; `ordinary`, y + J_ord (x' - x), the first-order Taylor expansion; `constant`,
        y.
    """

    size: float
    moved: float
    errors: dict[str, Error]

    __repr__ = brief


@dataclass(frozen=True)
class Ray:
    """A way to move the input, and what happens along it.

    Attributes
    ----------
    kind
        `noise`: every token at once in a random direction, in proportion to its length; `near` and `random`: one token
        towards one of its nearest neighbours, or towards any other token. At size 1 it has become that token.
    position, token
        Which token is moved, and towards which; None for noise.
    steps
        Places along the ray, by size.
    """

    kind: str
    position: int | None
    token: str | None
    steps: list[Step]

    __repr__ = brief


@dataclass(frozen=True)
class Validity:
    """Made by `validity`: every ray, and what was run."""

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: str
    tokens: list[str]
    rays: list[Ray]
    warnings: list[str]

    __repr__ = brief

    def curve(self, kind: str) -> list[Step]:
        """The mean over all rays of one kind at each size; none where there are no such rays."""
        rays = [ray for ray in self.rays if ray.kind == kind]
        return [_mean(steps) for steps in zip(*(ray.steps for ray in rays), strict=True)]

    def to_json(self) -> str:
        """All of it as JSON text, with the mean curves; floats that are not finite do not occur."""
        kinds = dict.fromkeys(ray.kind for ray in self.rays)
        curves = {kind: [asdict(step) for step in self.curve(kind)] for kind in kinds}
        return json.dumps(asdict(self) | {"curves": curves}, indent=1, ensure_ascii=False, allow_nan=False)


@in_plain_torch
def validity(
    lin: Linearized,
    position: int = -1,
    *,
    sizes: Sequence[float] = SIZES,
    draws: int = 4,
    swaps: int = 2,
    seed: int = 0,
) -> Validity:
    """Compare the frozen map, away from its prompt, with the model itself.

    The map J x + b is exact at the prompt and no expansion around it: a little away from there it is wrong in first
    order, where the ordinary Jacobian is right. This says by how much, and where the order is reversed.

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    position
        Which prediction: the one after this token.
    sizes
        Lengths of the random moves, as a share of each token's embedding.
    draws
        How many random directions.
    swaps
        For each token, attention sinks aside, how many nearest neighbours and how many random tokens to move it to.
    seed
        Of the random directions and tokens.

    Raises
    ------
    OptionError
        When there is nothing to move, or a size is not above 0.
    PromptError
        For a position outside the prompt.

    Notes
    -----
    Cost: `len(sizes) * draws + 12 * T * swaps` forward passes, and a column of the frozen and of the ordinary map for
    each ray.
    """
    draws, seed = whole("draws", draws, 0), whole("seed", seed, 0)
    swaps = whole("swaps", swaps, 0, Decoder(lin.model).vocabulary - 1)
    if not isinstance(sizes, Iterable):
        raise OptionError(f"sizes={sizes!r}: give a list of numbers")
    sizes = [real("sizes", size, above=0.0) for size in sizes]
    if draws + swaps < 1 or not sizes:
        raise OptionError("give at least one random direction or one swap, and at least one size")
    at = lin.trace.position(position)
    nearby, x = Nearby(lin, at), lin.embeddings
    generator = torch.Generator().manual_seed(seed)
    moves: list[Tensor] = []
    about: list[tuple[str, int | None, str | None, Sequence[float]]] = []
    for _ in range(draws):
        noise = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator).to(x), dim=-1)
        moves.append(noise * x.norm(dim=-1, keepdim=True))
        about.append(("noise", None, None, sizes))
    ids, swapped = _swaps(lin, at, swaps, generator)
    if not draws and not len(ids):
        raise OptionError(
            "every token up to that position is an attention sink: give a random direction, or another one"
        )
    for part in ids.split(64) if len(ids) else ():  # not all at once: their logits come along
        moves += list(nearby.tokens(part).embeddings.to(x) - x)
    names = lin.model.decode_each([int(row[i]) for row, (_, i) in zip(ids, swapped, strict=True)])
    about += [(kind, i, name, WAY) for (kind, i), name in zip(swapped, names, strict=True)]
    predictor = _Predictor(lin, at, torch.stack(moves))
    rays = []
    for number in tqdm(range(len(moves)), desc="moved inputs", unit="ray", delay=2, leave=False, disable=None):
        kind, i, name, places = about[number]
        rays.append(Ray(kind, i, name, _along(nearby, predictor, x, number, places)))
    return Validity(
        model=lin.model.info.to_dict(),
        settings={
            "position": at,
            "gate": lin.gate,
            "precision": lin.precision,
            "draws": draws,
            "swaps": swaps,
            "seed": seed,
            "token_ids": lin.input_ids[0].tolist(),
            "versions": versions(),
        },
        prompt=lin.text,
        tokens=lin.tokens,
        rays=rays,
        warnings=lin.warnings,
    )


class _Predictor:
    """What the frozen and the ordinary map say of the final state and the logits along each of several rays.

    Both are affine, so that one column for each ray gives every place on it.
    """

    def __init__(self, lin: Linearized, position: int, moves: Float[Tensor, "n T d"]) -> None:
        J = lin.jacobian(position=position)
        self.moves = moves
        self.value, self.logits = J.value, lin.jacobian(target="logits", position=position).value
        self._start = {"frozen": J.reconstruct(), "ordinary": J.value, "constant": J.value}
        self._slopes = {
            "frozen": J.matmat(moves),
            "ordinary": lin.ordinary_jacobian(position).matmat(moves),
            "constant": torch.zeros(len(moves), J.shape[0], dtype=J.dtype, device=J.device),
        }
        self._head = HeadLink(lin.trace, position)

    def at(self, name: str, ray: int, places: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """The final hidden state `[m, d]` and the logits `[m, V]` that one of them predicts at places along a ray."""
        final = self._start[name] + places[:, None] * self._slopes[name][ray]
        return final, self.logits + self._head.jvp(final - self.value)


def _along(nearby: Nearby, predictor: _Predictor, x: Tensor, ray: int, places: Sequence[float]) -> list[Step]:
    move, sizes = predictor.moves[ray], torch.tensor(places, dtype=x.dtype, device=x.device)
    true = nearby.embeddings(x + sizes[:, None, None] * move)
    errors = {name: _errors(true, predictor.value, *predictor.at(name, ray, sizes)) for name in PREDICTORS}
    length = relative(move, x)
    return [
        Step(size, size * length, {name: found[i] for name, found in errors.items()}) for i, size in enumerate(places)
    ]


def _errors(true: Outputs, start: Tensor, final: Tensor, logits: Tensor) -> list[Error]:
    target = true.final.to(final)
    off = (final - target).norm(dim=1)
    change = (target - start).norm(dim=1).clamp_min(torch.finfo(final.dtype).tiny)
    expected, said = true.log_probabilities, torch.log_softmax(logits.double(), dim=-1).to(true.logits.device)
    divergence = (expected.exp() * (expected - said)).sum(-1).clamp_min(0)
    same = expected.argmax(-1) == said.argmax(-1)
    columns = (off / target.norm(dim=1), off / change, divergence, same.double())
    return [Error(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]


def _swaps(
    lin: Linearized, position: int, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "n T"], list[tuple[str, int]]]:
    """The prompt with one token swapped, in every way asked for; each one's kind and position."""
    ids = lin.input_ids[0]
    places = [i for i in range(position + 1) if i not in lin.sinks]
    if not count or not places:
        return ids.new_zeros((0, len(ids))), []
    decoder = Decoder(lin.model)
    near = decoder.neighbours(ids[places], count)
    special = set(lin.model.tokenizer.all_special_ids) if lin.model.tokenizer is not None else set()
    rows, about = [], []
    for row, i in enumerate(places):
        chosen = _random_tokens(decoder, count, special | {int(ids[i])}, generator)
        for kind, others in (("near", near[row].tolist()), ("random", chosen)):
            for other in others:
                swapped = ids.clone()
                swapped[i] = other
                rows.append(swapped)
                about.append((kind, i))
    return torch.stack(rows), about


def _random_tokens(decoder: Decoder, count: int, without: set[int], generator: torch.Generator) -> list[int]:
    order = torch.randperm(decoder.vocabulary, generator=generator).tolist()
    known = decoder.model.tokens.knows
    return list(islice((token for token in order if token not in without and known(token)), count))


def _mean(steps: Iterable[Step]) -> Step:
    found = list(steps)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(found)

    errors = {
        name: Error(**{f.name: mean(getattr(step.errors[name], f.name) for step in found) for f in fields(Error)})
        for name in PREDICTORS
    }
    return Step(found[0].size, mean(step.moved for step in found), errors)
