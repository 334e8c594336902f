"""One attention head, and paths through heads: their linear maps in words, and their shares of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.groups import Group, Grouping, find_groups
from loclin.analyses.attribution.readout import Readout, read_target
from loclin.analyses.attribution.target import Target
from loclin.analyses.decode import Words, decoder_at
from loclin.common.arguments import strings, whole
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question
from loclin.maps.path_map import PathMap, component_map, path_map
from loclin.network.components import parse_component
from loclin.network.points import Point, parse_point
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.serialise import NOT_SAVED

_WORDS = 8


@dataclass(frozen=True)
class HeadTriple:
    """A singular triple of a head's joint map, from all tokens.

    `gains` `[T]` are sigma v_i . x_i: how much of the left vector the head writes from each token at this prompt.
    """

    value: float  # sigma
    writes: Words  # of the left vector, through the frozen final norm and the output head
    reads: Words  # the input embeddings nearest to the right vector v, at the token where it is largest
    gains: list[float]

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class Head(Result):
    """One query head at a prompt; made by `Linearization.head`.

    Attributes
    ----------
    name: `L3H5`: query head 5 of layer 3, also where several query heads share keys and values.
    pattern: the attention probabilities of the position `[T]`.
    target: the attribution target: its `kind`, `tokens`, `ids`, `value` and `position`.
    share: the head's direct effect on the target.
    attends, bias: the parts of the share that are read at each token `[T]`, and that come from biases before the head's
        output.
    triples: the largest singular triples of the map, in words.
    groups: groups of tokens, whose shares are added up; empty where none were asked for.
    map: the map from the layer's input at all tokens to the head's output at the position: W_O W_V through the frozen
        attention pattern. It belongs to a model in memory: a result that was loaded has None.
    """

    name: str
    pattern: Float[Tensor, " T"]
    target: dict[str, Any]
    share: float
    attends: Float[Tensor, " T"]
    bias: float
    triples: list[HeadTriple]
    provenance: Provenance
    warnings: list[str]
    map: PathMap | None = field(default=None, metadata=NOT_SAVED)
    groups: list[Group] = field(default_factory=list)

    def table(self) -> dict[str, list[Any]]:
        """One row per token: its text, its attention probability, and the part of the share that is read there."""
        return _tabulate(self.provenance.tokens, attention=self.pattern, share=self.attends)


@dataclass(frozen=True, eq=False)
class Path(Result):
    """A path through named components; made by `Linearization.path`.

    Attributes
    ----------
    name: the components, in order.
    target: as in `Head`.
    shares: the effect of each token on the target along this path `[T]`.
    token: the position of the chosen token; None for all tokens.
    groups: as in `Head`.
    map: the map from the embeddings to `final` along this path alone: the product of the components' maps. None in a
        result that was loaded.
    """

    name: str
    target: dict[str, Any]
    shares: Float[Tensor, " T"]
    token: int | None
    provenance: Provenance
    warnings: list[str]
    map: PathMap | None = field(default=None, metadata=NOT_SAVED)
    groups: list[Group] = field(default_factory=list)

    derived = ("share",)

    @property
    def share(self) -> float:
        """The effect of the chosen token, or of all tokens, on the target along this path."""
        return (self.shares.sum() if self.token is None else self.shares[self.token]).item()

    def table(self) -> dict[str, list[Any]]:
        """One row per token: its text, and its effect along this path."""
        return _tabulate(self.provenance.tokens, share=self.shares)


def _tabulate(tokens: list[str], **numbers: Tensor) -> dict[str, list[Any]]:
    given = {name: column.tolist() for name, column in numbers.items()}
    return {"token": list(range(len(tokens))), "text": tokens, **given}


@question
def head(
    lin: Linearized,
    layer: int,
    head: int,
    target: Target = None,
    *,
    k: int = 4,
    position: int = -1,
    group: Grouping | None = None,
) -> Head:
    """Show one query head: its map in words, its attention pattern, and its share of a target.

    Cost: two forward passes of the layer, d columns of its attention, and an SVD of its map.

    Raises OptionError for a layer, a head, a target or a k that does not exist; for a layer without heads; PromptError
    for a position outside the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    layer, head: which head; negative numbers count from the end.
    target: the attribution target, see `loclin.attribute`: one that is read at `final` or at the logits.
    k: how many singular triples to put into words.
    position: the position at which the head writes and the target is read.
    group: add the tokens' shares up, too: by a unit, a pattern or named positions, as `by` of `loclin.attribute`.
    """
    readout = _read_at_end(lin, target, position)
    groups = [] if group is None else find_groups(lin, group)
    layer, head, k = whole("layer", layer), whole("head", head), whole("k", k)
    parse_point(f"attn_out.{layer}", lin.trace.n_layers)
    J = component_map(lin.chain, parse_component(f"L{layer}H{head}", lin.trace), readout.position, lin.allowance)
    (link,) = J.chain.links
    g = readout.cotangent[readout.position]
    pulled = J.rmatvec(g)
    products = (pulled.double() * J.input.double()).sum(-1)
    svd = J.svd(k, joint=True, tolerance=1e-5)
    norm, decoder = lin.chain.norm(Point("final"), readout.position), decoder_at(lin, readout.position)
    writes = decoder.writes(norm.jvp(svd.U.T), _WORDS)
    strongest = svd.Vh.norm(dim=2).argmax(1)
    reads = decoder.reads(svd.Vh[range(k), strongest], _WORDS)
    gains = (svd.gains(J.input) * svd.S).T.tolist()
    return Head(
        name=str(link.component),
        pattern=link.attention(readout.position),
        target=readout.to_dict(),
        share=(g.double() @ J.value.to(g.device).double()).item(),
        attends=products,
        bias=(g.double() @ J.bias.to(g.device).double()).item(),
        triples=[HeadTriple(*row) for row in zip(svd.S.tolist(), writes, reads, gains, strict=True)],
        provenance=J.provenance(),
        warnings=[*lin.warnings, *readout.warnings],
        map=J,
        groups=groups,
    )


@question
def path(
    lin: Linearized,
    parts: Sequence[str],
    target: Target = None,
    *,
    token: int | None = None,
    position: int = -1,
    group: Grouping | None = None,
) -> Path:
    """Compute the effect of a token, or of all tokens, on a target along one path through named components.

    Cost: two forward passes and one column of each component's layer. Memory: the graphs of these layers.

    Raises OptionError for a component that does not exist, or components that are not in the order of the network;
    PromptError for a position outside the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    parts: the components of the path, in the order of the network: `L3H5` for a head, `attn_out.3` for a whole
        attention, `mlp_out.3` for an MLP; `L3H5@4` for what it writes at position 4 alone. Between two components the
        path follows the residual stream only.
    target: the attribution target, see `loclin.attribute`: one that is read at `final` or at the logits.
    token: the position of the token at which the path begins; None for all tokens.
    position: the position at which the target is read.
    group: add the tokens' shares up, too: by a unit, a pattern or named positions, as `by` of `loclin.attribute`.
    """
    readout = _read_at_end(lin, target, position)
    start = None if token is None else lin.trace.position(token)
    chosen = [parse_component(name, lin.trace) for name in strings("parts", parts)]
    J = path_map(lin.chain, chosen, Point("final"), readout.position, lin.allowance)
    *_, pulled = J.chain.pull_stream(readout.cotangent[None])
    shares = (pulled[0].double() * lin.embeddings.double()).sum(-1)
    warnings = [*lin.warnings, *readout.warnings]
    groups = [] if group is None else find_groups(lin, group)
    return Path(str(J.chain), readout.to_dict(), shares, start, J.provenance(), warnings, J, groups)


def _read_at_end(lin: Linearized, target: Target, position: int) -> Readout:
    lin, readout = read_target(lin, target, position)
    if len(readout.positions) > 1:
        raise OptionError(
            f"a target of {len(readout.positions)} tokens: heads and paths are for targets at one position; give one "
            "token, or use attribute(by='head')"
        )
    if readout.node != 2 * lin.trace.n_layers:
        raise OptionError(f"{readout.kind}: heads and paths are for targets at final or the logits; give one of these")
    return readout
