"""Sweeps that share out a target: from where it is read on the stream, back through the layers to the embeddings."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.analyses.attribution.result import KINDS, NONE, Kind
from loclin.analyses.attribution.target import Reading
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.network.blocks import Workspace
from loclin.network.chain import Chain
from loclin.network.link import Graph
from loclin.network.points import Point
from loclin.network.trace import Trace
from loclin.network.units import Inside, Projection
from loclin.network.widened import widened

_ROUNDING = 5e-7
"""Shares that miss their sum by more, over the sizes of what is summed, are computed again in float64."""

Row = tuple[int, int, int, int, float, float]
"""(kind, layer, index, token, share, through)."""


@dataclass
class Shares:
    """Shares as they are found; `notes` say what a reader should know of them."""

    rows: list[Row] = field(default_factory=list)
    biases: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    __repr__ = brief

    def add(
        self,
        kind: Kind,
        share: float,
        through: float | None = None,
        *,
        layer: int = NONE,
        index: int = NONE,
        token: int = NONE,
    ) -> None:
        """Add a share; where nothing else is said, what passes is the share."""
        self.rows.append((KINDS.index(kind), layer, index, token, share, share if through is None else through))

    def add_biases(self, shares: dict[str, float]) -> None:
        """Add what biases that stand in no layer's part give."""
        for name, share in shares.items():
            self.add("bias", share, index=self.number(name))

    def number(self, bias: str) -> int:
        """A bias's number."""
        return self.biases.setdefault(bias, len(self.biases))

    def error(self, reading: Reading) -> float:
        """How far the shares are from summing to the target, over the sizes of what is added up."""
        shares = [row[4] for row in self.rows]
        size = max(math.fsum(map(abs, shares)), reading.size, sys.float_info.min)
        return abs(reading.value - math.fsum(shares)) / size

    def ordered(self) -> list[Row]:
        """From the embeddings up, and last the biases that stand in no layer's part."""
        bias = KINDS.index("bias")
        return sorted(self.rows, key=lambda row: (row[0] == bias and row[1] == NONE, row[1]))


def swept(chain: Chain, reading: Reading, sweep: Callable[[Chain], Shares]) -> Shares:
    """Do a sweep; again in float64 where float32 rounds the sum too much."""
    shares = sweep(chain)
    if chain.trace.dtype == torch.float32 and shares.error(reading) > _ROUNDING:
        shares = sweep(Chain(widened(chain.trace)))
    return shares


def by_source(chain: Chain, reading: Reading, *, together: bool) -> Shares:
    """What the tokens and the biases give, by all ways; `together`: the tokens as one.

    What a model looks up for a token elsewhere than in its input embeddings is the token's, too.
    """
    trace, biases = chain.trace, dict(reading.constants)
    lookups: dict[str, Tensor] = {}
    block, workspace, active = _block(trace, 1), Workspace(), _active(trace, reading)
    block[0] = reading.cotangent
    for index, below, above in reversed(chain.steps(Point("embed"), _point(reading))):
        if trace.biased[index]:
            graph = chain.layers[index].graph(collect=True)
            if not together:
                lookups |= _by_lookup(graph, graph.points[above], block)
            block[:], given = _pull(graph, graph.points[above], block)
            for (name, _), share in zip(graph.constants, given[0].tolist(), strict=True):
                biases[name] = biases.get(name, 0.0) + share
        else:
            chain.pull(block, index, below, above, active, workspace)
    shares, given = Shares(), _by_token(trace, block)[0]
    if together:
        shares.add("embed", given.sum().item())
    else:
        for name, found in lookups.items():
            given = given + found.to(given)
            del biases[name]
            shares.notes.append(
                f"each token's share holds what its own rows of {name} give ({found.sum().item():+.3g} in all); in "
                "J x + b they are part of b"
            )
        for token, share in enumerate(given.tolist()):
            shares.add("token", share, token=token)
    shares.add_biases({name: share for name, share in biases.items() if share})
    return shares


def by_part(chain: Chain, reading: Reading, split: Kind | None) -> Shares:
    """What each part of each layer writes into the target, and all that passes it.

    With `split`, each `attn_out` is divided into its heads, or each `mlp_out` into its neurons, and the biases behind
    them. Notes name parts that have none and stay whole.

    Raises
    ------
    OptionError
        When no part has any.
    """
    trace, shares, wholes = chain.trace, Shares(), dict[str, list[int]]()
    unit: Kind = "head" if split == "attn_out" else "neuron"
    direct = total = reading.cotangent[None].to(trace.dtype)
    steps = chain.steps(Point("embed"), _point(reading))
    for index, _, above in tqdm(steps[::-1], desc="shares", unit="layer", delay=2, leave=False, disable=None):
        inside = Inside(trace.layers[index].block.parts) if split else None
        graph = chain.layers[index].graph(collect=inside is not None and trace.biased[index], inside=inside)
        output, found = graph.points[above], None
        if inside is not None and split is not None:
            if split in graph.points:
                found = inside.projection(split, graph.points[split], graph.constants)
            if found is None:
                wholes.setdefault(inside.why_whole(split), []).append(index)
        for kind, value in added(trace, index, above):
            end = graph.points.get(kind, output)
            if found is not None and kind == split:
                _divide(shares, found, unit, index, (end, direct), (output, total))
            else:
                passing = _vjp(output, end, total) if kind == "attn_out" else total
                shares.add(kind, _product(direct, value), _product(passing, value), layer=index)
        total = _vjp(output, graph.points["resid_pre"], total)
    if wholes and sum(map(len, wholes.values())) == len(steps):
        raise OptionError(f"{trace.model.info.name}: {next(iter(wholes))}; use by='layer'")
    x = trace.layers[0].value[0]
    shares.add("embed", _product(direct, x), _product(total, x))
    shares.add_biases(reading.constants)
    shares.notes += [f"{why}; whole in layers {', '.join(map(str, sorted(layers)))}" for why, layers in wholes.items()]
    return shares


def by_token_and_layer(chain: Chain, reading: Reading, budget: int) -> Shares:
    """What the tokens and the biases write into the target by way of each part as the last one on the way.

    As many parts at a time as the budget allows, from the last on.
    """
    trace, shares = chain.trace, Shares()
    direct = reading.cotangent[None].to(trace.dtype)
    steps = chain.steps(Point("embed"), _point(reading))[::-1]
    ways = [(index, kind) for index, _, above in steps for kind, _ in added(trace, index, above)]
    most = max(1, budget // (chain.column_bytes(Point("final")) + direct.nbytes))
    with tqdm(total=len(ways), desc="shares", unit="part", delay=2, leave=False, disable=None) as bar:
        for start in range(0, len(ways), most):
            some = ways[start : start + most]
            below = [step for step in steps if step[0] <= some[0][0]]
            block, biases = _ending_in(chain, direct, some, below, _active(trace, reading), bar)
            for (index, kind), row, bias in zip(some, _by_token(trace, block).tolist(), biases.tolist(), strict=True):
                for token, share in enumerate(row):
                    shares.add(kind, share, layer=index, token=token)
                if any(trace.biased):
                    shares.add(kind, bias, layer=index)
    for token, share in enumerate(_by_token(trace, direct)[0].tolist()):
        shares.add("embed", share, token=token)
    shares.add_biases(reading.constants)
    return shares


def _ending_in(
    chain: Chain,
    direct: Tensor,
    ways: list[tuple[int, Kind]],
    steps: list[tuple[int, str, str]],
    active: slice,
    bar: tqdm,
) -> tuple[Float[Tensor, "n T d"], Float[Tensor, " n"]]:
    """The cotangents at the embeddings of all ways that end in one of some parts; what the biases on them give."""
    trace, workspace, done = chain.trace, Workspace(), 0
    block, biases = _block(trace, len(ways)), torch.zeros(len(ways), dtype=torch.float64)
    for index, below, above in steps:
        graph = chain.layers[index].graph(collect=trace.biased[index])
        if trace.biased[index] and done:
            block[:done], given = _pull(graph, graph.points[above], block[:done])
            biases[:done] += given.sum(1)
        elif done:
            chain.pull(block[:done], index, below, above, active, workspace)
        for kind in (kind for layer, kind in ways if layer == index):
            pulled, given = _pull(graph, graph.points.get(kind, graph.points[above]), direct)
            block[done], biases[done] = pulled[0] - direct[0] * (kind not in graph.points), given.sum()
            done += 1
            bar.update()
    return block, biases


def added(trace: Trace, index: int, above: str) -> list[tuple[Kind, Float[Tensor, "T d"]]]:
    """What a layer adds to the stream up to `above`, part by part; as one where its parts cannot be told apart."""
    block = trace.layers[index].block.parts
    if above == "resid_mid":
        return [("attn_out", trace.value(Point("attn_out", index)))]
    if block.attn is not None and block.mlp is not None:
        both: tuple[Kind, ...] = ("attn_out", "mlp_out")
        return [(kind, trace.value(Point(kind, index))) for kind in both]
    after, before = trace.value(Point("resid_post", index)), trace.value(Point("resid_pre", index))
    kind: Kind = "attn_out" if block.attn is not None else "mlp_out" if block.mlp is not None else "block"
    return [(kind, after - before.to(after.device))]


def _divide(shares: Shares, found: Projection, kind: Kind, layer: int, *ends: tuple[Tensor, Tensor]) -> None:
    """Add the shares of a projection's heads or neurons, and of the biases behind it.

    The two ends are places in the layer's graph with their cotangents: what the part writes, and what passes it.
    """
    parts = [found.source, *(leaf for _, leaf in found.behind)]
    shared, passing = (_products(end, parts, cotangent) for end, cotangent in ends)
    length, count = shared[0].numel() // shared[0].shape[-1], found.count
    units = [p[0].reshape(length, count, -1).sum((0, 2)) for p in (shared, passing)]
    for index, (share, through) in enumerate(zip(*(unit.tolist() for unit in units), strict=True)):
        shares.add(kind, share, through, layer=layer, index=index)
    for (name, _), share, through in zip(found.behind, shared[1:], passing[1:], strict=True):
        number = shares.number(name)
        shares.add("bias", share.sum().item(), through.sum().item(), layer=layer, index=number)


def _products(output: Tensor, parts: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Each part times its weight in the product of the output with a cotangent, element by element."""
    pulled = torch.autograd.grad(output, parts, cotangent.to(output), retain_graph=True, allow_unused=True)
    values = [part.detach().double() for part in parts]
    return [torch.zeros_like(v) if g is None else g.double() * v for g, v in zip(pulled, values, strict=True)]


def _pull(graph: Graph, output: Tensor, cotangents: Float[Tensor, "n T d"]) -> tuple[Tensor, Tensor]:
    """Pull cotangents back to the layer's input `[n, T, d]`; what each constant on the way gives, `[n, constants]`."""
    leaves = [leaf for _, leaf in graph.constants]
    x = graph.points["resid_pre"]
    given = cotangents.new_zeros(len(cotangents), len(leaves), dtype=torch.float64)
    if not output.requires_grad:
        return torch.zeros_like(cotangents), given
    block = cotangents.to(output)[:, None]
    pulled, *weights = torch.autograd.grad(
        output, [x, *leaves], block, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for i, (weight, leaf) in enumerate(zip(weights, leaves, strict=True)):
        if weight is not None:
            given[:, i] = (weight.double() * leaf.detach().double()).reshape(len(given), -1).sum(1)
    return torch.zeros_like(cotangents) if pulled is None else pulled[:, 0].to(cotangents), given


def _by_lookup(graph: Graph, output: Tensor, cotangent: Float[Tensor, "1 T d"]) -> dict[str, Float[Tensor, " T"]]:
    """What each token's rows of other tables than the input embeddings give, float64."""
    found: dict[str, Tensor] = {}
    if graph.lookups and output.requires_grad:
        names, leaves = zip(*graph.constants, strict=True)
        for name, given in zip(names, _products(output, list(leaves), cotangent), strict=True):
            if name in graph.lookups:
                found[name] = found.get(name, 0.0) + given.flatten(2).sum((0, 2))
    return found


def _vjp(output: Tensor, source: Tensor, cotangent: Float[Tensor, "1 T d"]) -> Float[Tensor, "1 T d"]:
    (pulled,) = torch.autograd.grad(output, source, cotangent.to(output), retain_graph=True, allow_unused=True)
    return torch.zeros_like(cotangent) if pulled is None else pulled.to(cotangent)


def _product(cotangent: Float[Tensor, "1 T d"], value: Float[Tensor, "T d"]) -> float:
    return (cotangent[0].double() * value.to(cotangent.device).double()).sum().item()


def _by_token(trace: Trace, cotangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T"]:
    """What each token's embedding gives, float64."""
    return torch.einsum("ntd,td->nt", cotangents.double(), trace.layers[0].value[0].double())


def _block(trace: Trace, columns: int) -> Float[Tensor, "n T d"]:
    """A block of cotangents as sweeps take it: what belongs to one position is one matrix."""
    return trace.layers[0].value.new_zeros(trace.length, columns, trace.width).transpose(0, 1)


def _active(trace: Trace, reading: Reading) -> slice:
    """The positions that the target can depend on."""
    return slice(0, reading.position + 1 if trace.causal else trace.length)


def _point(reading: Reading) -> Point:
    """The point on the stream at which a target is read."""
    layer, mid = divmod(reading.node, 2)
    if mid:
        return Point("resid_mid", layer)
    return Point("resid_post", layer - 1) if layer else Point("embed")
