"""Inputs from which the map's first right singular vectors are projected out."""

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
    """The unmodified model at a projected input, compared with the prompt itself.

    What is projected out is `joint`, the first k right singular vectors of [J_0 ... J_{T-1}]; `each`, those of every
    token's own map; `each word`, the same without attention sinks. With the suffix ` random`: random subspaces of the
    same dimension instead. With ` moved`: each token moved by the same distance in a random direction. Both are means
    over `SEEDS` draws.
    """

    plane: str
    k: int
    moved: float  # |x' - x| / |x|
    drop: float  # how far the log-probability of the prediction falls, in nats
    output: float  # the relative change of the final hidden state


def project(lin: Linearized, nearby: Nearby, target: int, seed: int = 0) -> list[Projected]:
    """Project singular vectors and random subspaces out of the embeddings. Cost: the dense map, 109 forward passes."""
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
            off = _project(x, found[..., :rank, :]) * where
            inputs.append(x - off)
            names.append((plane, rank))
            for _ in range(SEEDS):
                noise = torch.randn(found.shape, generator=generator).to(x)
                basis = torch.linalg.qr(noise[..., :rank, :].mT).Q.mT
                direction = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator).to(x), dim=-1)
                inputs += [x - _project(x, basis) * where, x + direction * off.norm(dim=-1, keepdim=True)]
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


def _project(x: Float[Tensor, "T d"], basis: Tensor) -> Float[Tensor, "T d"]:
    """Project x onto a subspace: one of all tokens together `[k, T d]`, or one for each token `[T, k, d]`."""
    if basis.dim() == 2:
        return (basis.mT @ (basis @ x.flatten())).reshape(x.shape)
    return torch.einsum("tkd,tk->td", basis, torch.einsum("tkd,td->tk", basis, x))
