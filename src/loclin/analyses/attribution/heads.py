"""One head in full, and paths of heads: their maps, in words, and what they give of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.target import Reading, Target, read
from loclin.analyses.decode import Decoder, Words
from loclin.common.arguments import strings, whole
from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.maps.path_map import PathMap, part_map, path_map
from loclin.network.parts import parse_part
from loclin.network.points import Point, parse

_WORDS = 8


@dataclass(frozen=True)
class HeadTriple:
    """A singular triple of a head's map, all tokens side by side.

    Attributes
    ----------
    value
        The singular value.
    writes
        What the left vector writes, through the frozen final norm and the head of the model.
    reads
        The input embeddings nearest to the right vector, at the token where it is largest.
    gains
        `[T]`: the value times v_i . x_i, how much of the left vector the head writes from each token here.
    """

    value: float
    writes: Words
    reads: Words
    gains: list[float]

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class Head:
    """A query head at a prompt; made by `Linearization.head`.

    Attributes
    ----------
    name
        `L3H5`: query head 5 of layer 3, whatever keys and values it shares.
    map
        What enters the layer at all tokens -> what the head writes at the position: O V through the frozen pattern.
    pattern
        `[T]`: the attention that the position gives to each token.
    target
        The target's `kind`, `tokens`, `ids`, `value` and `position`.
    share
        What the head writes into the target, directly.
    attends
        `[T]`: the parts of the share that it reads at each token; with `bias` they sum to it.
    bias
        The part of the share that comes from biases in front of the head's output.
    triples
        The largest singular triples of its map in words.
    warnings
        What a reader should know before trusting it.
    """

    name: str
    map: PathMap
    pattern: Float[Tensor, " T"]
    target: dict[str, Any]
    share: float
    attends: Float[Tensor, " T"]
    bias: float
    triples: list[HeadTriple]
    warnings: list[str]

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Everything but the map, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("map", "triples")}
        plain |= {"pattern": self.pattern.tolist(), "attends": self.attends.tolist()}
        return plain | {"triples": [asdict(t) for t in self.triples], "provenance": self.map.provenance().to_dict()}


@dataclass(frozen=True, eq=False)
class Path:
    """A path through named parts; made by `Linearization.path`.

    Attributes
    ----------
    name
        The parts, in order.
    map
        Embeddings -> `final` by this path alone: the product of its parts' maps.
    target
        The target's `kind`, `tokens`, `ids`, `value` and `position`.
    shares
        `[T]`: what each token gives of the target by this path.
    source
        The token asked for; None for all.
    warnings
        What a reader should know before trusting it.
    """

    name: str
    map: PathMap
    target: dict[str, Any]
    shares: Float[Tensor, " T"]
    source: int | None
    warnings: list[str]

    __repr__ = brief

    @property
    def share(self) -> float:
        """What the source gives of the target by this path."""
        return (self.shares.sum() if self.source is None else self.shares[self.source]).item()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the map, for JSON."""
        about: dict[str, Any] = {"name": self.name, "target": self.target, "source": self.source, "share": self.share}
        return about | {
            "warnings": self.warnings,
            "shares": self.shares.tolist(),
            "provenance": self.map.provenance().to_dict(),
        }


@in_plain_torch
def head(lin: Linearized, layer: int, head: int, target: Target = None, *, k: int = 4, position: int = -1) -> Head:
    """Look at one query head.

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    layer, head
        Which; negative numbers count back.
    target
        What its share is of, see `loclin.attribute`. It is read at `final` or the logits.
    k
        How many singular triples to put into words.
    position
        Where the head writes and the target is read.

    Raises
    ------
    OptionError
        For a layer, a head, a target or a k that does not exist; where the layer has no heads.
    PromptError
        For a position outside the prompt.

    Notes
    -----
    Cost: two forward passes of the layer, d columns of its attention, and an SVD of its map.
    """
    reading = _at_the_end(lin, read(lin, target, position))
    layer, head, k = whole("layer", layer), whole("head", head), whole("k", k)
    parse(f"attn_out.{layer}", lin.trace.n_layers)
    J = part_map(lin.chain, parse_part(f"L{layer}H{head}", lin.trace), reading.position, lin.memory)
    (link,) = J.chain.parts
    g = reading.cotangent[reading.position]
    pulled = J.rmatvec(g)
    products = (pulled.double() * J.input.double()).sum(-1)
    svd = J.svd(k, joint=True, tolerance=1e-5)
    norm, decoder = lin.chain.norm(Point("final"), reading.position), Decoder(lin.model)
    writes = decoder.writes(norm.jvp(svd.U.T), _WORDS)
    strongest = svd.Vh.norm(dim=2).argmax(1)
    reads = decoder.reads(svd.Vh[range(k), strongest], _WORDS)
    gains = (svd.gains(J.input) * svd.S).T.tolist()
    return Head(
        name=str(link.part),
        map=J,
        pattern=link.pattern[reading.position],
        target=reading.to_dict(),
        share=(g.double() @ J.value.to(g.device).double()).item(),
        attends=products,
        bias=(g.double() @ J.bias.to(g.device).double()).item(),
        triples=[HeadTriple(*row) for row in zip(svd.S.tolist(), writes, reads, gains, strict=True)],
        warnings=[*lin.warnings, *reading.warnings],
    )


@in_plain_torch
def path(
    lin: Linearized, source: int | None, parts: Sequence[str], target: Target = None, *, position: int = -1
) -> Path:
    """Follow a path from a token through named parts to a target.

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    source
        The token it begins at, or None for all of them.
    parts
        What it goes through, from below: `L3H5` for a head, `attn_out.3` for a whole attention, `mlp_out.3` for an MLP;
        `L3H5@4` for what it writes at position 4 alone. Between them, only the residual stream.
    target
        What it ends in, see `loclin.attribute`. It is read at `final` or the logits.
    position
        Where the target is read.

    Raises
    ------
    OptionError
        For a part that does not exist, or parts that are not in the order of the network.
    PromptError
        For a position outside the prompt.

    Notes
    -----
    Cost: two forward passes and one column of each part's layer. Memory: these layers' graphs.
    """
    reading = _at_the_end(lin, read(lin, target, position))
    start = None if source is None else lin.trace.position(source)
    chosen = [parse_part(name, lin.trace) for name in strings("parts", parts)]
    J = path_map(lin.chain, chosen, Point("final"), reading.position, lin.memory)
    *_, pulled = J.chain.through(reading.cotangent[None])
    shares = (pulled[0].double() * lin.embeddings.double()).sum(-1)
    return Path(str(J.chain), J, reading.to_dict(), shares, start, [*lin.warnings, *reading.warnings])


def _at_the_end(lin: Linearized, reading: Reading) -> Reading:
    if reading.node != 2 * lin.trace.n_layers:
        raise OptionError(f"{reading.kind}: heads and paths are shown for targets at final or the logits")
    return reading
