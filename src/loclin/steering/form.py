"""How a hidden state is moved towards a direction."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["add", "interpolate"]
NEUTRAL: dict[Form, float] = {"add": 0.0, "interpolate": 1.0}
"""The strength of each form that leaves the model as it is."""


def steered(
    h: Float[Tensor, "*b d"], S: Float[Tensor, "*b d"], strength: float | Tensor, form: Form
) -> Float[Tensor, "*b d"]:
    """The hidden state h `[..., d]` moved towards S, in h's dtype; computed in the wider of the two.

    A strength is one for all, or has the shape of h but for ones.
    """
    wide = h.to(torch.promote_types(h.dtype, S.dtype))
    if form == "interpolate":
        return (strength * wide + (1 - strength) * S).to(h.dtype)
    unit = S / S.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)  # zero where S is
    return (wide + strength / 2 * wide.norm(dim=-1, keepdim=True) * unit).to(h.dtype)
