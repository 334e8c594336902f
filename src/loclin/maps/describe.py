"""Which map a result is of: the model, the prompt, the map's ends and what was frozen."""

from __future__ import annotations

from typing import Any

from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.results.provenance import Provenance


def describe_map(
    chain: Chain,
    source: Point,
    target: Point,
    position: int,
    normed: bool,
    positions: list[int],
    *,
    certificate: dict[str, Any] | None = None,
) -> Provenance:
    """The provenance of what is computed from the map between two points."""
    trace, options = chain.trace, chain.options
    return Provenance.of(
        trace.model,
        trace.input_ids[0].tolist(),
        gate="ordinary" if options.ordinary else options.gate,
        precision=trace.options.resolved(trace.sequence.dtype),
        dtype=trace.dtype,
        source=str(source),
        target=str(target),
        position=position,
        normed=normed,
        positions=positions,
        certificate=certificate,
    )
