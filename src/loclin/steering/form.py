"""The formulas that move a hidden state towards a direction."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["add", "interpolate"]
NEUTRAL: dict[Form, float] = {"add": 0.0, "interpolate": 1.0}
"""The strength of each form that leaves the model unchanged."""


def move_towards(
    h: Float[Tensor, "*b d"], S: Float[Tensor, "*b d"], strength: float | Tensor, form: Form
) -> Float[Tensor, "*b d"]:
    """Move hidden states h `[..., d]` towards S; the result has the dtype of h.

    "add" gives h + strength |h| / (2 |S|) S, "interpolate" strength h + (1 - strength) S, computed in the wider dtype
    of the two. `strength` is one number, or a tensor that broadcasts with h.
    """
    wide = h.to(torch.promote_types(h.dtype, S.dtype))
    if form == "interpolate":
        return (strength * wide + (1 - strength) * S).to(h.dtype)
    unit = S / S.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)  # zero where S is zero
    return (wide + strength / 2 * wide.norm(dim=-1, keepdim=True) * unit).to(h.dtype)
