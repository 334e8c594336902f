"""The same trace with sweeps in float64: for sums that float32 rounds too much."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loclin.network.trace import Trace


def widened(trace: Trace) -> Trace:
    """A trace whose links work in float64, with the coefficients and values that it has.

    What is far larger at one token than elsewhere (an attention sink) is multiplied by weights that nearly cancel; in
    float32 such a product is the whole sweep's largest error. Cost: a copy of what is remembered; then each sweep
    converts the weights of one layer at a time.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(torch.float64)

    return replace(
        trace,
        layers=[replace(call, value=call.value.double()) for call in trace.layers],
        attn_out=[wide(added) for added in trace.attn_out],
        end=replace(trace.end, value=trace.end.value.double()),
        final=trace.final.double(),
        coefficients=tuple(None if held is None else held.to(torch.float64) for held in trace.coefficients),
    )
