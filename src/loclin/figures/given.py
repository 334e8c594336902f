"""What figures are drawn from: a linearized prompt, whose analysis is made, or the saved result of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loclin.analyses.explain import Explanation, explain
from loclin.analyses.layers import LayerExplanation, explain_layers
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized

Explained = Linearized | Explanation
Layered = Linearized | LayerExplanation


def explained(given: Any, vectors: int = 1) -> list[Explanation]:
    """Explanations with so many singular vectors in words, of one prompt or of several."""
    found = [explain(one, k=vectors) if isinstance(one, Linearized) else one for one in _several(given)]
    for one in found:
        if not isinstance(one, Explanation):
            raise _unfit(one, "lin.explain()")
        held = max((block.indices[-1] + 1 for token in one.tokens for block in token.blocks), default=vectors)
        if held < vectors:
            raise OptionError(
                f"lines={vectors}: {one.provenance.model.name}'s explanation has {held} singular vectors in words; "
                f"make it with k={vectors}, or ask for fewer lines"
            )
    return found


def layered(given: Any, *, components: Sequence[str] | None = None) -> LayerExplanation:
    """The explanation of all layers."""
    found = explain_layers(given, components=components) if isinstance(given, Linearized) else given
    if not isinstance(found, LayerExplanation):
        raise _unfit(found, "lin.explain_layers()")
    return found


def _several(given: Any) -> list[Any]:
    found = list(given) if isinstance(given, Sequence) else [given]
    if not found:
        raise OptionError("there is nothing to draw: give a linearized prompt, or several")
    return found


def _unfit(given: Any, call: str) -> OptionError:
    return OptionError(
        f"this figure is not drawn from {type(given).__name__}: give the result of loclin.linearize, or of {call}"
    )
