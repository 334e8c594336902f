"""The input without what the map reads most: projected off its top right singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.nearby import Nearby
from loclin.common.sums import norms
from loclin.maps.linearized import Linearized

RANKS = (1, 2, 4, 8)
SEEDS = 4


@dataclass(frozen=True)
class Projected:
    """The untouched model at a projected input, against the prompt as it is.

    Attributes
    ----------
    plane
        `joint` and `each`: off the top k right singular vectors of [J_0 … J_{T-1}], or of every token's own map;
        `each word`: attention sinks are left as they are. Before ` random`: off random planes instead of those; before
        ` moved`: moved as far, token by token, in random directions. Of both, the mean over `SEEDS`.
    k
        How many vectors.
    moved
        |x' - x| / |x|.
    drop
        How far the log-probability of the prediction falls.
    output
        The relative change of the final hidden state.
    """

    plane: str
    k: int
    moved: float
    drop: float
    output: float


def projections(lin: Linearized, nearby: Nearby, target: int, seed: int = 0) -> list[Projected]:
    """Project a prompt's embeddings off singular and off random planes. Cost: the dense map, 109 forward passes."""
    x, J = lin.embeddings, lin.jacobian()
    J.dense()
    k = max(RANKS)
    each = J.svd(k).Vh.to(x)
    joint = J.svd(k, joint=True).Vh.to(x).reshape(k, -1)
    words = torch.tensor([i not in lin.sinks for i in range(len(x))], device=x.device)[:, None]
    generator = torch.Generator().manual_seed(seed)
    inputs, names = [x], [("", 0)]
    for rank in RANKS:
        for plane, found in (("joint", joint), ("each", each), ("each word", each)):
            where = words if plane == "each word" else torch.ones_like(words)
            off = _off(x, found[..., :rank, :]) * where
            inputs.append(x - off)
            names.append((plane, rank))
            for _ in range(SEEDS):
                noise = torch.randn(found.shape, generator=generator).to(x)
                basis = torch.linalg.qr(noise[..., :rank, :].mT).Q.mT
                direction = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator).to(x), dim=-1)
                inputs += [x - _off(x, basis) * where, x + direction * off.norm(dim=-1, keepdim=True)]
                names += [(f"{plane} random", rank), (f"{plane} moved", rank)]
    stacked = torch.stack(inputs)
    outputs = nearby.embeddings(stacked)
    moved = norms(stacked - x, 1) / norms(x)
    logs = outputs.log_probabilities[:, target]
    changed = norms(outputs.final - outputs.final[0], 1) / norms(outputs.final[0])
    results = []
    for name in dict.fromkeys(names[1:]):
        rows = [row for row, other in enumerate(names) if other == name]
        drop = (logs[0] - logs[rows]).mean().item()
        results.append(Projected(*name, moved[rows].mean().item(), drop, changed[rows].mean().item()))
    return results


def _off(x: Float[Tensor, "T d"], basis: Tensor) -> Float[Tensor, "T d"]:
    """The part of x within a plane: of all tokens together `[k, T d]`, or one plane for each `[T, k, d]`."""
    if basis.dim() == 2:
        return (basis.mT @ (basis @ x.flatten())).reshape(x.shape)
    return torch.einsum("tkd,tk->td", basis, torch.einsum("tkd,td->tk", basis, x))
