"""The linear map of a steering text, applied to other texts (paper, section 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from loclin.common.arguments import real, whole
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError, SteeringError
from loclin.maps.linearized import Linearized
from loclin.results.provenance import Provenance
from loclin.results.serialise import to_plain
from loclin.steering.base import Steering, site
from loclin.steering.match import fingerprint

Align = Literal["cycle", "nearest"]
At = Literal["output", "input", "published"]
Signs = Literal["free", "fixed"]
_SAME = ("weights", "target", "point", "normed", "align", "gate", "rank", "spare_first")


@dataclass(frozen=True, repr=False, kw_only=True)
class Operator(Steering):
    """The maps of one or several steering texts from the embeddings to a layer: S_p = sum_{q <= p} J[q] x_q.

    Made by `Operator.make` and `merge`. Attributes that are not here are those of `Steering`.

    Attributes
    ----------
    left: `[N, d, d]`, the maps of the N = T tokens of one text; or `[N, d, k]`, left singular vectors times values.
    right: the right singular vectors `[N, k, d]`; None for full-rank maps.
    signs: fixed signs `[N, k]` of the singular vectors' coefficients; None: each new text has its own.
    embeddings: `[N, d]`, those of the steering tokens.
    lengths: how many of the N maps belong to each text; one number unless merged.
    normed, align, gate, rank: as for `make`.
    sources: for each text, its weight in the sum and the provenance of its map.
    provenance: that of the first text's map.
    """

    left: Float[Tensor, "N d k"]
    right: Float[Tensor, "N k d"] | None
    signs: Float[Tensor, "N k"] | None
    embeddings: Float[Tensor, "N d"]
    lengths: list[int]
    point: str
    normed: bool
    align: Align
    gate: str
    rank: int | None
    model: dict[str, Any]
    weights: str
    spare_first: bool
    sources: list[dict[str, Any]]
    provenance: Provenance | None
    warnings: list[str] = field(default_factory=list)
    accumulates = True

    @classmethod
    @in_plain_torch
    def make(
        cls,
        lin: Linearized,
        layer: int,
        *,
        at: At = "output",
        rank: int | None = None,
        normed: bool = False,
        positions: Sequence[int] | Literal["all", "words"] = "all",
        position: int = -1,
        align: Align = "cycle",
        signs: Signs = "free",
        spare_first: bool = False,
    ) -> Operator:
        """Make the operator of a linearized steering text.

        Parameters
        ----------
        layer
            The layer whose output (or input) is steered; negative ones count from the end.
        at
            "output" or "input": the maps end at the layer's output or its input, and S is added there. "published": as
            in the code of the paper's author, the maps end at the layer's output, followed by the final norm
            (`normed`), and S is added at the layer's input.
        rank
            Keep this many singular triples of each token's map; None keeps the full map.
        normed
            Apply the final norm, frozen at the text's own hidden state, after the maps; "published" always does.
        positions
            The tokens of the steering text whose maps are kept, in this order: "all", "words" (without attention sinks
            and beginning token), or positions.
        position
            The position of the steering text at which the maps end; the last by default.
        align
            Which map is applied to a new token. "cycle": the map at the token's position modulo T, as the paper's
            author does. "nearest": the map of the steering token with the most similar embedding, by cosine.
        signs
            "fixed" gives each singular vector's coefficient the sign that it has in the steering text; needs a rank.
        spare_first
            Leave the first token of new texts unchanged. The paper's author steers it, too: for a beginning token that
            both texts share, S is close to its own hidden state.

        Raises
        ------
        OptionError, PromptError
            For a layer, a rank, an alignment, tokens or a position that do not exist.

        Notes
        -----
        Cost: d columns through the layers up to this one; with a rank, also T SVDs. Memory: T d^2 numbers, or 2 T k d.
        """
        if at not in get_args(At):
            raise OptionError(f"at={at!r}: choose output, input or published")
        if align not in get_args(Align) or signs not in get_args(Signs):
            raise OptionError(f"align={align!r}, signs={signs!r}: choose cycle or nearest, and free or fixed")
        if signs == "fixed" and rank is None:
            raise OptionError("signs='fixed' is for maps of low rank: give rank=, too")
        rank = None if rank is None else whole("rank", rank)
        normed, layer = normed or at == "published", whole("layer", layer)
        where = site(lin.model, f"{'resid_post' if at == 'output' else 'resid_pre'}.{layer}")
        target = site(lin.model, f"{'resid_pre' if at == 'input' else 'resid_post'}.{layer}")
        J = lin.jacobian(target=str(target), position=position, normed=normed)
        chosen = _choose_positions(lin, positions)
        right = fixed = None
        if rank is None:
            left = J.dense().transpose(0, 1)[chosen]
        else:
            found = J.svd(rank)
            left, right = (found.U * found.S.unsqueeze(1))[chosen], found.Vh[chosen]
            if signs == "fixed":
                fixed = found.gains(J.input)[chosen].sign()
        provenance = replace(J.provenance(), positions=chosen)
        return cls(
            left=left,
            right=right,
            signs=fixed,
            embeddings=lin.embeddings[chosen].to(J.device, J.dtype),
            lengths=[len(chosen)],
            point=str(where),
            normed=normed,
            align=align,
            gate=provenance.gate,
            rank=rank,
            model=lin.model.info.to_dict(),
            weights=fingerprint(lin.model.hf),
            spare_first=spare_first,
            sources=[{"weight": 1.0, "provenance": to_plain(provenance)}],
            provenance=provenance,
            warnings=lin.warnings,
        )

    def __repr__(self) -> str:
        texts = ", ".join(repr(source["provenance"]["text"]) for source in self.sources)
        rank = "all columns" if self.rank is None else f"rank {self.rank}"
        added = "" if self.point == self.target else f"added at {self.point}, "
        return f"Operator({texts} -> {self.target}{'.normed' * self.normed}, {added}{rank})"

    @property
    def target(self) -> str:
        """The point at which its maps end, before a final norm: `point`, unless it is published."""
        return str(self.sources[0]["provenance"]["target"])

    @property
    def published(self) -> bool:
        """Whether it is the operator of the paper's author (see `make`)."""
        return self.normed and self.point == self.target.replace("resid_post", "resid_pre") != self.target

    @property
    def width(self) -> int:
        """d, the width of the hidden states it acts on."""
        return self.embeddings.shape[-1]

    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Compute J[q] x_q for tokens with embeddings x at positions q of their texts, summed over the merged texts."""
        x = x.to(self.left.dtype)
        total, start = torch.zeros_like(x), 0
        for length in self.lengths:
            own = self.embeddings[start : start + length]
            nearest = (normalize(x, dim=-1) @ normalize(own, dim=-1).T).argmax(-1) if self.align == "nearest" else None
            maps = start + (index % length if nearest is None else nearest)
            for i in maps.unique().tolist():
                rows = maps == i
                total[rows] += self._multiply(i, x[rows])
            start += length
        return total

    @in_plain_torch
    def apply_to(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Compute S_p at each position of one text with embeddings x."""
        return self.push(x, torch.arange(len(x), device=x.device)).cumsum(0)

    def _multiply(self, i: int, x: Tensor) -> Tensor:
        if self.right is None:
            return x @ self.left[i].T
        coefficients = x @ self.right[i].T
        if self.signs is not None:
            coefficients = coefficients.abs() * self.signs[i]
        return coefficients @ self.left[i].T


@in_plain_torch
def merge(operators: Sequence[Operator], weights: Sequence[float] | None = None) -> Operator:
    """Merge operators of several texts: S is the weighted sum of theirs, by default the mean.

    A negative weight steers away from its text. The maps of each text are aligned by its own length. Operators that
    differ in model, points, norm, alignment, gate split, rank or signs raise a SteeringError; no operators, or another
    number of weights, an OptionError.
    """
    if not operators:
        raise OptionError("merge needs at least one operator: give a list of operators")
    weights = [1 / len(operators)] * len(operators) if weights is None else [real("weights", w) for w in weights]
    if len(weights) != len(operators):
        raise OptionError(f"{len(operators)} operators and {len(weights)} weights: give one weight for each")
    head = operators[0]
    for other in operators[1:]:
        differing = [name for name in _SAME if getattr(head, name) != getattr(other, name)]
        if (head.signs is None) != (other.signs is None):
            differing.append("signs")
        if differing:
            what = ", ".join(f"{n} ({getattr(head, n)!r} and {getattr(other, n)!r})" for n in differing)
            raise SteeringError(f"merged operators must not differ in {what}; make them with equal options")

    weighted = list(zip(weights, operators, strict=True))
    joined: dict[str, Any] = {
        name: torch.cat([getattr(operator, name) for operator in operators])
        for name in ("right", "signs", "embeddings")
        if getattr(head, name) is not None
    }
    return replace(
        head,
        left=torch.cat([weight * operator.left for weight, operator in weighted]),
        lengths=[length for operator in operators for length in operator.lengths],
        sources=[one | {"weight": weight * one["weight"]} for weight, operator in weighted for one in operator.sources],
        **joined,
    )


def _choose_positions(lin: Linearized, positions: Sequence[int] | str) -> list[int]:
    length = len(lin.tokens)
    if positions == "all":
        return list(range(length))
    if positions == "words":
        return [i for i in range(length) if i not in lin.non_words] or list(range(length))
    if isinstance(positions, str) or not positions:
        raise OptionError(f"positions={positions!r}: choose all, words, or a list of positions")
    return [lin.trace.position(i) for i in positions]
