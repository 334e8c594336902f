"""How far from its prompt the frozen map predicts the model: in random directions, and towards other tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loclin.analyses.decode import Decoder
from loclin.analyses.nearby import Nearby, Outputs
from loclin.common.arguments import real, whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, bar, steps, with_progress
from loclin.common.sums import relative_error
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question
from loclin.models.placeholders import find_placeholders
from loclin.network.ends import OutputHeadLink
from loclin.results.provenance import Provenance
from loclin.results.result import AtPrompt
from loclin.results.table import make_columns

SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Lengths of random moves, relative to the norm of each token's embedding."""
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""Points on the line from one token's embedding to another's, as fractions."""
_RAYS = 64  # that are done at a time: each has logits
_MOVES = 6  # copies of a move in sweeps
PREDICTORS = ("frozen", "ordinary", "constant")


@dataclass(frozen=True)
class Deviation:
    """The errors of one predictor at a moved input, or their means."""

    final: float  # |predicted - true| / |true| of the final hidden state
    missed: float  # |predicted - true| / |true - y|: the fraction of the true change that is not predicted
    kl: float  # KL(true || predicted) of the next-token probabilities, in nats
    top: float  # 1 if the most probable token is the same, else 0


@dataclass(frozen=True)
class Step:
    """One point on a ray.

    The predictors are `frozen`, J x' + b; `ordinary`, y + J_ord (x' - x), the first-order Taylor expansion; and
    `constant`, y.
    """

    size: float  # the fraction or length along the ray
    moved: float  # |x' - x| / |x| over all tokens
    errors: dict[str, Deviation]  # by predictor

    __repr__ = brief


@dataclass(frozen=True)
class Ray:
    """A direction in which the input is moved, and the errors along it.

    Its kind is `noise`: all tokens at once, each in a random direction, in proportion to its norm; or `near` or
    `random`: one token towards one of its nearest neighbours, or towards a random token, which it is at size 1.
    """

    kind: str
    position: int | None  # of the token that is moved; None for noise
    token: str | None  # towards which it is moved
    steps: list[Step]  # by size

    __repr__ = brief


@dataclass(frozen=True)
class Validity(AtPrompt):
    """How far the map is valid; made by `validity`.

    Attributes
    ----------
    settings: how many random directions and swaps, and their seed.
    tokens: the T input tokens.
    rays: every direction, and the errors along it.
    """

    provenance: Provenance
    settings: dict[str, Any]
    tokens: list[str]
    rays: list[Ray]
    warnings: list[str]

    derived = ("prompt", "curves")

    @property
    def curves(self) -> dict[str, list[Step]]:
        """The mean curve of each kind of ray."""
        return {kind: self.curve(kind) for kind in dict.fromkeys(ray.kind for ray in self.rays)}

    def curve(self, kind: str) -> list[Step]:
        """Average all rays of one kind at each size; empty if there are no such rays."""
        rays = [ray for ray in self.rays if ray.kind == kind]
        return [_average(steps) for steps in zip(*(ray.steps for ray in rays), strict=True)]

    def table(self) -> dict[str, list[Any]]:
        """One row per ray, point and predictor."""
        rows = (
            (n, ray.kind, ray.position, ray.token, step.size, step.moved, name, *astuple(step.errors[name]))
            for n, ray in enumerate(self.rays)
            for step in ray.steps
            for name in PREDICTORS
        )
        return make_columns("ray kind position becomes size moved predictor final missed kl top", rows)


@question
@with_progress
def validity(
    lin: Linearized,
    *,
    position: int = -1,
    sizes: Sequence[float] = SIZES,
    draws: int = 4,
    swaps: int = 2,
    seed: int = 0,
    progress: Progress = True,
) -> Validity:
    """Compare the frozen map with the model itself at inputs away from the prompt.

    The map J x + b is exact at the prompt, but it is not a Taylor expansion: nearby it is wrong to first order, where
    the ordinary Jacobian is right. This measures by how much, and from which distance on the frozen map is the better
    one.

    Cost: `len(sizes) * draws + 12 * T * swaps` forward passes; for each ray one column of the frozen and of the
    ordinary map.

    Raises OptionError when nothing is to be moved, or a size is not above 0; PromptError for a position outside the
    prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    position: the prediction after this token is compared.
    sizes: lengths of the random moves, relative to the norm of each token's embedding.
    draws: how many random directions.
    swaps: to how many nearest neighbours, and to how many random tokens, to move each token. Attention sinks stay.
    seed: the seed of the random directions and tokens.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    lin.model.refuse_other_tasks("validity", "causal")
    tell = steps(progress)
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
    states = []
    for _ in range(draws):
        states.append(generator.get_state())
        torch.randn(x.shape, generator=generator)
    ids, swapped = _swap_tokens(lin, at, swaps, generator)
    if not draws and not swapped:
        raise OptionError(
            "no token up to that position can be swapped (sinks, images and vectors are not): give a random direction, "
            "or another position"
        )
    names = lin.model.decode_each([int(row[i]) for row, (_, i) in zip(ids, swapped, strict=True)])
    rays = [Ray("noise", None, None, [])] * draws
    rays += [Ray(kind, i, name, []) for (kind, i), name in zip(swapped, names, strict=True)]
    tell("what the maps predict, and what the model gives")
    most = max(1, min(_RAYS, lin.allowance.spare // (_MOVES * x.nbytes)))
    with bar(total=len(rays), desc="moved inputs", unit="ray") as progress_bar:
        for start in range(0, len(rays), most):
            some = rays[start : start + most]
            noise = [_random_move(x, state) for state in states[start : start + most]]
            rows = ids[max(0, start - draws) : max(0, start + len(some) - draws)]
            swapped_moves = list(nearby.tokens(rows).embeddings.to(x) - x) if len(rows) else []
            predictor = _Predictor(lin, at, torch.stack(noise + swapped_moves))
            for number, ray in enumerate(some):
                places = sizes if ray.kind == "noise" else FRACTIONS
                rays[start + number] = replace(ray, steps=_measure_ray(nearby, predictor, x, number, places))
                progress_bar.update()
    return Validity(
        provenance=lin.jacobian(position=at).provenance(),
        settings={"draws": draws, "swaps": swaps, "seed": seed},
        tokens=lin.tokens,
        rays=rays,
        warnings=lin.warnings,
    )


def _random_move(x: Float[Tensor, "T d"], state: Tensor) -> Float[Tensor, "T d"]:
    """A random direction for every token at once, in proportion to its norm."""
    generator = torch.Generator()
    generator.set_state(state)
    noise = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator).to(x), dim=-1)
    return noise * x.norm(dim=-1, keepdim=True)


class _Predictor:
    """Predicts hidden states and logits along rays by two affine maps: one column for each ray gives all its points."""

    def __init__(self, lin: Linearized, position: int, moves: Float[Tensor, "n T d"]) -> None:
        J = lin.jacobian(position=position)
        self.moves = moves
        self.value, self.logits = J.value, lin.jacobian(target="logits", position=position).value
        self._start = {"frozen": J.reconstruct(), "ordinary": J.value, "constant": J.value}
        self._slopes = {
            "frozen": J.matmat(moves),
            "ordinary": lin.ordinary_jacobian(position=position).matmat(moves),
            "constant": torch.zeros(len(moves), J.shape[0], dtype=J.dtype, device=J.device),
        }
        self._head = OutputHeadLink(lin.trace, position)

    def at(self, name: str, ray: int, places: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """Predict the final hidden state `[m, d]` and the logits `[m, V]` at m points of a ray, with one predictor."""
        final = self._start[name] + places[:, None] * self._slopes[name][ray]
        return final, self.logits + self._head.jvp(final - self.value)


def _measure_ray(nearby: Nearby, predictor: _Predictor, x: Tensor, ray: int, places: Sequence[float]) -> list[Step]:
    move, sizes = predictor.moves[ray], torch.tensor(places, dtype=x.dtype, device=x.device)
    true = nearby.embeddings(x + sizes[:, None, None] * move)
    errors = {name: _measure_errors(true, predictor.value, *predictor.at(name, ray, sizes)) for name in PREDICTORS}
    length = relative_error(move, x)
    found = [dict(zip(errors, row, strict=True)) for row in zip(*errors.values(), strict=True)]
    return [Step(size, size * length, row) for size, row in zip(places, found, strict=True)]


def _measure_errors(true: Outputs, start: Tensor, final: Tensor, logits: Tensor) -> list[Deviation]:
    target = true.final.to(final)
    off = (final - target).norm(dim=1)
    change = (target - start).norm(dim=1).clamp_min(torch.finfo(final.dtype).tiny)
    expected, said = true.log_probabilities, torch.log_softmax(logits.double(), dim=-1).to(true.logits.device)
    divergence = (expected.exp() * (expected - said)).sum(-1).clamp_min(0)
    same = expected.argmax(-1) == said.argmax(-1)
    columns = (off / target.norm(dim=1), off / change, divergence, same.double())
    return [Deviation(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]


def _swap_tokens(
    lin: Linearized, position: int, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, "n T"], list[tuple[str, int]]]:
    """List the prompts with one token swapped `[n, T]`, and the kind and position of each swap."""
    ids = lin.input_ids[0]
    stand_ins = find_placeholders(lin.model).keys()
    places = [i for i in range(position + 1) if i not in lin.sinks and ids[i] >= 0 and int(ids[i]) not in stand_ins]
    if not count or not places:
        return ids.new_zeros((0, len(ids))), []
    decoder, known = Decoder(lin.model), lin.model.tokens.knows
    near = decoder.neighbours(ids[places], count).tolist()
    special = set(lin.model.tokenizer.all_special_ids) if lin.model.tokenizer is not None else set()
    special |= stand_ins
    rows, about = [], []
    for i, neighbours in zip(places, near, strict=True):
        order, without = torch.randperm(decoder.vocabulary, generator=generator).tolist(), special | {int(ids[i])}
        drawn = (token for token in order if token not in without and known(token))
        for kind, others in (("near", neighbours), ("random", islice(drawn, count))):
            for other in (token for token in others if token not in stand_ins):
                swapped = ids.clone()
                swapped[i] = other
                rows.append(swapped)
                about.append((kind, i))
    return torch.stack(rows), about


def _average(steps: Sequence[Step]) -> Step:
    """Average the errors at one size."""
    errors = {}
    for name in PREDICTORS:
        columns = zip(*(astuple(step.errors[name]) for step in steps), strict=True)
        errors[name] = Deviation(*(sum(column) / len(steps) for column in columns))
    return Step(steps[0].size, sum(step.moved for step in steps) / len(steps), errors)
