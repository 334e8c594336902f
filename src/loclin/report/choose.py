"""Which tokens of a long prompt to show."""

from __future__ import annotations

from collections.abc import Sequence

from loclin.analyses.explain import TokenExplanation


def largest(tokens: Sequence[TokenExplanation], most: int) -> list[int]:
    """Find the positions of the `most` tokens with the largest |share|, in the prompt's order."""
    ranked = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].share))
    return sorted(ranked[:most])


def full_colour(tokens: Sequence[TokenExplanation]) -> float:
    """Find the |share| to draw in full colour: the largest, sinks aside, which would pale all others."""
    words = [abs(t.share) for t in tokens if not t.is_sink] or [abs(t.share) for t in tokens]
    return max(words, default=0.0) or 1.0
