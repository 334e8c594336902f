"""The scores that the protocol of disrupt and recover compares: the frozen map's, with shared attention, and rivals'.

Every method gives one number for each token `[T]`. A name is the method and its options, joined by slashes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.faithfulness.methods import GATES, linear_map
from loclin.analyses.faithfulness.rivals import every_rival
from loclin.analyses.faithfulness.zeroing import Zeroing
from loclin.analyses.nearby import Nearby
from loclin.errors import ModelError
from loclin.freeze import Gate, SharedAttention
from loclin.maps.linearized import Linearized

READOUTS = ("logit", "centred")
SHARED = {
    "¼ ¼ ½": SharedAttention(),
    "⅛ ⅛ ¾": SharedAttention(0.125, 0.125, 0.75),
    "¼ ¼ 1": SharedAttention(0.25, 0.25, 1.0),
}
"""Weights of queries, keys and values; the first are those of AttnLRP and DPA."""
BEST_EXACT = "frozen/half/centred"
ADDITIVE = ("frozen/", "shared/", "gradient × input", "integrated gradients", "DePass")
"""Methods whose scores are meant to sum to the logit."""


def score_each(
    lin: Linearized, nearby: Nearby, zeroing: Zeroing, target: int, seed: int
) -> dict[str, Float[Tensor, " T"]]:
    """The scores of every method.

    Cost: two columns for each gate and for each kind of shared attention, about 3 T columns, and 22 forward and
    backward passes of the model.
    """
    length = lin.trace.length
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {
        "random": torch.rand(length, generator=generator, dtype=torch.float64),
        "last first": torch.arange(length, dtype=torch.float64),
    }
    found |= dict(every_rival(lin, nearby, target))
    found |= dict(_frozen(lin, target))
    found["occlusion"] = zeroing.each()
    return {name: score.detach().double().cpu() for name, score in found.items()}


def _frozen(lin: Linearized, target: int) -> Iterator[tuple[str, Tensor]]:
    """The frozen map's shares by every gate, and those with shared attention by half gates, of both readouts.

    None with shared attention where a model computes its attention step by step.
    """
    kinds: list[tuple[str, Gate, SharedAttention | None]] = [(f"frozen/{gate}", gate, None) for gate in GATES]
    kinds += [(f"shared/{name}", "half", weights) for name, weights in SHARED.items()]
    for name, gate, shared in kinds:
        J = linear_map(lin, gate, shared)
        rows = torch.zeros(len(READOUTS), J.shape[0], dtype=J.dtype, device=J.device)
        rows[:, target] = 1
        rows[1] -= 1 / J.shape[0]
        try:
            pulled = J.rmatmat(rows)
        except ModelError:
            if shared is None:
                raise
            return  # attention step by step: it cannot be shared
        for readout, slopes in zip(READOUTS, pulled, strict=True):
            yield f"{name}/{readout}", (slopes * lin.embeddings.to(slopes)).sum(-1)
