"""Names of points along the network, as in TransformerLens, and their order along the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loclin.errors import OptionError

KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
ENDS = ("embed", "final", "logits")


@dataclass(frozen=True)
class Point:
    """A named point. `kind` is one of `KINDS` (with a layer) or `ENDS` (without)."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @property
    def on_stream(self) -> bool:
        """False for `attn_out` and `mlp_out`, which are added to the residual stream and are not on it."""
        return self.kind not in ("attn_out", "mlp_out")

    def node(self, n_layers: int) -> int:
        """The point's number along the residual stream: two nodes a layer, then `final`, then `logits`.

        A point off the stream has the number of the node where it has just been added.
        """
        if self.layer is None:
            return {"embed": 0, "final": 2 * n_layers + 1, "logits": 2 * n_layers + 2}[self.kind]
        return 2 * self.layer + (KINDS.index(self.kind) + 1) // 2


class Span(NamedTuple):
    """Where a map begins and ends: a target at one position, with the final norm on top of it if `normed`."""

    source: Point
    target: Point
    position: int
    normed: bool = False


def parse_point(name: str | Point, n_layers: int) -> Point:
    """Read a point's name, such as `"resid_post.3"`; negative layers count from the end. OptionError lists names."""
    if isinstance(name, Point):
        return name
    if not isinstance(name, str):
        raise OptionError(f"point {name!r}: give its name, such as 'resid_post.3'")
    kind, _, number = name.partition(".")
    if kind in ENDS and not number:
        return Point(kind)
    if kind not in KINDS:
        raise OptionError(
            f"no point {name!r}: choose {', '.join(ENDS)} or {', '.join(f'{k}.L' for k in KINDS)} for a layer L"
        )
    try:
        layer = int(number)
    except ValueError:
        raise OptionError(f"point {name!r} has no layer: write {kind}.0 for layer 0") from None
    if not -n_layers <= layer < n_layers:
        raise OptionError(f"point {name!r}: the model has layers 0 to {n_layers - 1}")
    return Point(kind, layer % n_layers)
