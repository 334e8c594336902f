"""Steering with one direction, the same at every position: baselines for an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from loclin.common.arguments import strings, whole
from loclin.common.sums import refuse_non_finite
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.network.points import Point
from loclin.results.provenance import Provenance
from loclin.steering.base import Steering, site
from loclin.steering.match import fingerprint
from loclin.steering.replay import Replay


@dataclass(frozen=True, repr=False, kw_only=True)
class Vector(Steering):
    """One direction at every position: S_p = S.

    Attributes
    ----------
    direction, rule: S `[d]`, and how it was found.
    provenance: that of the map from which it comes, if any.
    """

    direction: Float[Tensor, " d"]
    rule: str
    point: str
    model: dict[str, Any]
    weights: str
    spare_first: bool = True
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)
    accumulates = False

    def __repr__(self) -> str:
        return f"Vector({self.rule} -> {self.point})"

    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:  # noqa: ARG002
        """Return S for each of n tokens."""
        return self.direction.expand(len(x), -1)


def _make_vector(
    model: Model, point: Point, direction: Tensor, rule: str, provenance: Provenance | None = None
) -> Vector:
    refuse_non_finite("the direction", direction)
    return Vector(
        direction=direction.detach(),
        rule=rule,
        point=str(point),
        model=model.info.to_dict(),
        weights=fingerprint(model.hf),
        provenance=provenance,
    )


def activation_addition(lin: Linearized, point: str) -> Vector:
    """Use the steering text's hidden state at its last token (Turner et al. 2023). Cost: none.

    It equals the result of the text's full-rank operator, with its bias, for the text itself: S = J x + b.
    """
    where = site(lin.model, point)
    return _make_vector(lin.model, where, lin.value(str(where))[-1], "activation addition")


def output_basis(lin: Linearized, point: str, k: int = 8) -> Vector:
    """Project the text's last hidden state onto the first k left singular vectors of the joint map [J_0 ... J_{T-1}].

    Cost: the joint SVD (see `LinearMap.svd`).
    """
    where = site(lin.model, point)
    J = lin.jacobian(target=str(where))
    U = J.svd(k, joint=True).U
    return _make_vector(lin.model, where, U @ (U.T @ J.value.to(U)), f"output basis, rank {k}", J.provenance())


def pullback(lin: Linearized, point: str, ids: Sequence[int]) -> Vector:
    """Find the direction at a point that raises the log-probability of some next tokens most, by the suffix map.

    The suffix map is the frozen map from the point to the logits, at the steering text's last token. Its transpose is
    applied to the gradient of the log of the tokens' summed probability with respect to the logits. Cost: one column.
    Without tokens it raises an OptionError.
    """
    ids = [whole("ids", token) for token in ids]
    if not ids:
        raise OptionError("pullback needs at least one token: give its id")
    where = site(lin.model, point)
    J = lin.jacobian(source=str(where), target="logits")
    log_p = log_softmax(J.value, dim=-1)
    gradient = -log_p.exp()
    gradient[ids] += torch.softmax(log_p[ids], dim=0)
    return _make_vector(lin.model, where, J.rmatvec(gradient)[-1], "suffix map", J.provenance())


def random_direction(model: Model, point: str, seed: int = 0) -> Vector:
    """Draw a random direction, for comparison."""
    embeddings: Any = model.hf.get_input_embeddings()
    direction = torch.randn(embeddings.weight.shape[-1], generator=torch.Generator().manual_seed(seed))
    return _make_vector(model, site(model, point), direction.to(model.device), f"random, seed {seed}")


def mean_difference(
    model: Model,
    texts: Sequence[str],
    others: Sequence[str],
    point: str,
    *,
    last: bool = False,
    bos: bool | str | None = None,
) -> Vector:
    """Subtract the mean hidden state of other texts from that of some texts.

    Means are over all tokens except the first of each text, which may be an attention sink; with `last`, over last
    tokens only. Cost: one forward pass of each of the two batches.
    """
    where, start = site(model, point), -1 if last else 1
    texts, others = strings("texts", texts), strings("others", others)
    means = [
        torch.cat([states[start:] for states in hidden_states(model, group, where, bos)]).mean(0)
        for group in (texts, others)
    ]
    which = "last tokens" if last else "tokens"
    return _make_vector(model, where, means[0] - means[1], f"mean difference over {which} of {len(texts)} texts")


def contrast(model: Model, pairs: Sequence[tuple[str, str]], point: str, *, bos: bool | str | None = None) -> Vector:
    """Find the first principal direction of differences at the last tokens of paired texts (Zou et al. 2023; repeng).

    Differences are not centred, since the order of a pair is arbitrary. The sign is that of the mean difference. Cost:
    one forward pass of each of the two batches. Without pairs it raises a PromptError.
    """
    if not pairs:
        raise PromptError("contrast needs at least one pair of texts: give [(text, other), ...]")
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise OptionError("contrast takes pairs of texts: give [(text, other), ...]")
    where = site(model, point)
    sides = [hidden_states(model, [pair[side] for pair in pairs], where, bos) for side in (0, 1)]
    with_it, without = (torch.stack([states[-1] for states in side]) for side in sides)
    differences = with_it - without
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    direction = direction * torch.sign(differences.mean(0) @ direction)
    return _make_vector(model, where, direction, f"contrast of {len(pairs)} pairs")


def hidden_states(model: Model, texts: Sequence[str], where: Point, bos: bool | str | None = None) -> list[Tensor]:
    """Return the hidden states of each text `[T_b, d]` at a layer's input or output, in float32 or wider."""
    texts = strings("texts", texts)
    if not texts:
        raise PromptError("give at least one text")
    found = Replay(model, [model.encode(text, bos=bos) for text in texts]).rows(str(where))
    return [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in found]
