"""Steering by one direction, the same at every position: what an operator is to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from loclin.common.arguments import strings, whole
from loclin.common.sums import refuse_broken
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.network.points import Point
from loclin.results.result import Provenance
from loclin.steering.base import Steering, site
from loclin.steering.match import fingerprint
from loclin.steering.replay import Replay


@dataclass(frozen=True, repr=False, kw_only=True)
class Vector(Steering):
    """One direction at every position: S_p = S.

    Attributes
    ----------
    direction
        S `[d]`.
    rule
        How it was found.
    point, model, weights, spare_first
        See `Steering`.
    provenance
        Of the map it was found with, where there is one.
    """

    direction: Float[Tensor, " d"]
    rule: str
    point: str
    model: dict[str, Any]
    weights: str
    spare_first: bool = True
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        return f"Vector({self.rule} -> {self.point})"

    @property
    def accumulates(self) -> bool:
        """False: S is the same everywhere."""
        return False

    @property
    def gates(self) -> set[str]:
        """The gate split of the map it came from, where it came from one."""
        return set() if self.provenance is None else {self.provenance.gate}

    def to(self, device: torch.device) -> Vector:
        """The same on a device."""
        return replace(self, direction=self.direction.to(device))

    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:  # noqa: ARG002
        """S, for each of n tokens."""
        return self.direction.expand(len(x), -1)


def _vector(model: Model, point: Point, direction: Tensor, rule: str, provenance: Provenance | None = None) -> Vector:
    refuse_broken("the direction", direction)
    return Vector(
        direction=direction.detach(),
        rule=rule,
        point=str(point),
        model=model.info.to_dict(),
        weights=fingerprint(model.hf),
        provenance=provenance,
    )


def activation_addition(lin: Linearized, point: str) -> Vector:
    """The steering text's own hidden state at its last token (Turner et al. 2023). Cost: none.

    It is what the text's whole operator, with its bias, gives for the text itself: S = J x + b.
    """
    where = site(lin.model, point)
    return _vector(lin.model, where, lin.value(str(where))[-1], "activation addition")


def output_basis(lin: Linearized, point: str, k: int = 8) -> Vector:
    """That hidden state's part in the k largest output directions of the joint map [J_0 ... J_{T-1}].

    Cost: the joint SVD (see `LinearMap.svd`).
    """
    where = site(lin.model, point)
    J = lin.jacobian(target=str(where))
    U = J.svd(k, joint=True).U
    return _vector(lin.model, where, U @ (U.T @ J.value.to(U)), f"output basis, rank {k}", J.provenance())


def pullback(lin: Linearized, point: str, ids: Sequence[int]) -> Vector:
    """The suffix map's answer: the direction at a point along which the log-probability of some next tokens rises.

    The frozen map from the point to the logits, transposed, at the steering text's last token; applied to the gradient
    of the log of the tokens' summed probability in the logits. Cost: one column.

    Raises
    ------
    OptionError
        When there are no tokens.
    """
    ids = [whole("ids", token) for token in ids]
    if not ids:
        raise OptionError("pullback needs the ids of at least one token")
    where = site(lin.model, point)
    J = lin.jacobian(source=str(where), target="logits")
    log_p = log_softmax(J.value, dim=-1)
    towards = -log_p.exp()
    towards[list(ids)] += torch.softmax(log_p[list(ids)], dim=0)
    return _vector(lin.model, where, J.rmatvec(towards)[-1], "suffix map", J.provenance())


def random_direction(model: Model, point: str, seed: int = 0) -> Vector:
    """A direction drawn at random, for comparison."""
    embeddings: Any = model.hf.get_input_embeddings()
    direction = torch.randn(embeddings.weight.shape[-1], generator=torch.Generator().manual_seed(seed))
    return _vector(model, site(model, point), direction.to(model.device), f"random, seed {seed}")


def mean_difference(
    model: Model,
    texts: Sequence[str],
    others: Sequence[str],
    point: str,
    *,
    last: bool = False,
    bos: bool | str | None = None,
) -> Vector:
    """The mean hidden state of some texts less that of others.

    Over all tokens but each text's first, which may be an attention sink; or with `last` over last tokens alone. Cost:
    two batches of texts, each read once.
    """
    where, start = site(model, point), -1 if last else 1
    texts, others = strings("texts", texts), strings("others", others)
    means = [
        torch.cat([states[start:] for states in hidden_states(model, group, where, bos)]).mean(0)
        for group in (texts, others)
    ]
    which = "last tokens" if last else "tokens"
    return _vector(model, where, means[0] - means[1], f"mean difference over {which} of {len(texts)} texts")


def contrast(model: Model, pairs: Sequence[tuple[str, str]], point: str, *, bos: bool | str | None = None) -> Vector:
    """The first principal direction of the differences at the last tokens of paired texts (Zou et al. 2023; repeng).

    Not centred, since pairs could as well be turned round; its sign is that of the mean difference. Cost: two batches
    of texts, each read once.

    Raises
    ------
    PromptError
        When there are no pairs.
    """
    if not pairs:
        raise PromptError("contrast needs at least one pair of texts")
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise OptionError("contrast takes pairs of texts: [(text, other), ...]")
    where = site(model, point)
    sides = [hidden_states(model, [pair[side] for pair in pairs], where, bos) for side in (0, 1)]
    with_it, without = (torch.stack([states[-1] for states in side]) for side in sides)
    differences = with_it - without
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    direction = direction * torch.sign(differences.mean(0) @ direction)
    return _vector(model, where, direction, f"contrast of {len(pairs)} pairs")


def hidden_states(model: Model, texts: Sequence[str], where: Point, bos: bool | str | None = None) -> list[Tensor]:
    """Each text's hidden states `[T_b, d]` at a layer's input or output, in float32 or wider; one batch.

    Raises
    ------
    PromptError
        When there are no texts.
    """
    texts = strings("texts", texts)
    if not texts:
        raise PromptError("give at least one text")
    found = Replay(model, [model.encode(text, bos=bos) for text in texts]).rows(str(where))
    return [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in found]
