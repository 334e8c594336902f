"""Backward sweeps that compute shares: from the target's gradient on the residual stream down to the embeddings.

The share of a value c with the cotangent g is g . c. `direct` is the target's gradient where it reads the residual
stream, `total` its vjp from there through all layers above the current one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.analyses.attribution.readout import Readout
from loclin.analyses.attribution.result import KINDS, NONE, Kind
from loclin.common.brief import brief
from loclin.common.progress import bar
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.network.autograd import grad
from loclin.network.blocks import Workspace
from loclin.network.chain import Chain
from loclin.network.explicit import ExplicitLayer
from loclin.network.graph import Graph
from loclin.network.points import Point
from loclin.network.trace import Trace
from loclin.network.units import OutputProjection, UnitFinder

_ROUNDING = 5e-7
"""If the shares miss the target by more, relative to the size of the terms, they are computed again in float64."""

Row = tuple[int, int, int, int, float, float]
"""(kind, layer, index, token, share, through)."""


@dataclass
class Shares:
    """Shares as a sweep finds them; `notes` are warnings about them.

    `gradient` is the target's at the embeddings, where a sweep to the sources has it.
    """

    rows: list[Row] = field(default_factory=list)
    biases: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    gradient: Float[Tensor, "T d"] | None = None

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
        """Add a share; without `through`, the total effect is the share itself."""
        self.rows.append((KINDS.index(kind), layer, index, token, share, share if through is None else through))

    def add_biases(self, shares: dict[str, float]) -> None:
        """Add the shares of biases that belong to no component of a layer."""
        for name, share in shares.items():
            self.add("bias", share, index=self.number_bias(name))

    def number_bias(self, bias: str) -> int:
        """Return the index of a bias; a new bias gets the next one."""
        return self.biases.setdefault(bias, len(self.biases))

    def by_group(self, groups: list[list[int]]) -> Shares:
        """The same with the shares of each group of tokens added up."""
        number, token = {at: i for i, held in enumerate(groups) for at in held}, KINDS.index("token")
        found = Shares(biases=self.biases, notes=self.notes)
        each: list[list[float]] = [[] for _ in groups]
        for row in self.rows:
            if row[0] == token:
                each[number[row[3]]].append(row[4])
        for i, shares in enumerate(each):
            found.add("group", math.fsum(shares), index=i)
        found.rows += [row for row in self.rows if row[0] != token]
        return found

    def minus(self, other: Shares, shared: int, length: int) -> Shares:
        """Subtract the shares of another prompt, whose first `shared` tokens are those of this one.

        What belongs to the same token, component or bias is one share. Behind the `length` tokens of this prompt come
        the other's own.
        """
        found, named = Shares(), (KINDS.index("bias"), KINDS.index("adapter"))
        found.notes = list(dict.fromkeys([*self.notes, *other.notes]))
        sums: dict[tuple[int, int, int, int], tuple[float, float]] = {}
        for sign, side, behind in ((1, self, 0), (-1, other, length - shared)):
            names = list(side.biases)
            for kind, layer, index, token, share, through in side.rows:
                number = found.number_bias(names[index]) if kind in named else index
                key = (kind, layer, number, token + behind * (token >= shared))
                before = sums.get(key, (0.0, 0.0))
                sums[key] = before[0] + sign * share, before[1] + sign * through
        found.rows = [(*key, *both) for key, both in sums.items()]
        return found

    def relative_error(self, readout: Readout) -> float:
        """Return how far the shares miss the target, relative to the size of the terms."""
        shares = [row[4] for row in self.rows]
        size = max(math.fsum(map(abs, shares)), readout.size, sys.float_info.min)
        return abs(readout.value - math.fsum(shares)) / size

    def sort_rows(self) -> list[Row]:
        """Sort by layer, embeddings first; biases that belong to no component come last."""
        bias = KINDS.index("bias")
        return sorted(self.rows, key=lambda row: (row[0] == bias and row[1] == NONE, row[1]))


def compute_shares(lin: Linearized, readout: Readout, sweep: Callable[[Chain], Shares]) -> Shares:
    """Compute shares with a sweep; again in float64 if float32 rounds their sum too much, where the budget allows."""
    shares, trace = sweep(lin.chain), lin.trace
    error = shares.relative_error(readout) if trace.dtype == torch.float32 else 0.0
    if error <= _ROUNDING:
        return shares
    allowed = lin.allowance
    # twice the values, the coefficients and a layer's work
    if 2 * (allowed.kept + allowed.coefficients) + allowed.work <= allowed.spare:
        return sweep(Chain(trace.double()))
    shares.notes.append(
        f"float32 rounds the sum of the shares by {error:.1e} of their size, and the memory budget has no room to "
        "compute them in float64: give more memory."
    )
    return shares


def share_by_source(chain: Chain, readout: Readout, *, together: bool) -> Shares:
    """Compute the total effects of the tokens and the biases; `together`: all tokens as one share.

    Rows that a model looks up for a token in further embedding tables count as the token's, too.
    """
    block, biases, lookups = pull_to_sources(chain, readout, look_up=not together)
    shares, given = Shares(gradient=block[0]), _sum_by_token(chain.trace, block)[0]
    if together:
        shares.add("embed", given.sum().item())
    else:
        for name, found in lookups.items():
            given = given + found.to(given)
            del biases[name]
            shares.notes.append(
                f"Each token's share includes its own rows of {name} ({found.sum().item():+.3g} in all); in "
                "J x + b they are part of b."
            )
        for token, share in enumerate(given.tolist()):
            shares.add("token", share, token=token)
    shares.add_biases({name: share for name, share in biases.items() if share})
    return shares


def pull_to_sources(
    chain: Chain, readout: Readout, *, look_up: bool
) -> tuple[Float[Tensor, "1 T d"], dict[str, float], dict[str, Float[Tensor, " T"]]]:
    """Pull the target's gradient to the embeddings; with what each bias adds, and what each looked-up row adds."""
    trace, biases = chain.trace, dict(readout.constants)
    lookups: dict[str, Tensor] = {}
    block, workspace, active = new_block(trace, 1), Workspace(), find_active(trace, readout)
    block[0] = readout.cotangent
    for index, below, above in list_steps(chain, readout):
        if trace.biased[index] or chain.options.adapters_held:
            graph = chain.layers[index].graph(collect=True)
            if look_up:
                lookups |= _weigh_lookups(graph, graph.points[above], block)
            block[:], given = _pull(graph, graph.points[above], block)
            for (name, _), share in zip(graph.constants, given[0].tolist(), strict=True):
                biases[name] = biases.get(name, 0.0) + share
        else:
            chain.pull(block, index, below, above, active, workspace)
    return block, biases, lookups


def share_by_component(chain: Chain, readout: Readout, split: Kind | None) -> Shares:
    """Compute the direct and the total effect of each component of each layer.

    With `split`, each `attn_out` is split into its heads, or each `mlp_out` into its neurons, and the biases after
    them. Notes name the components that cannot be split; OptionError if none can.
    """
    trace, shares, wholes = chain.trace, Shares(), dict[str, list[int]]()
    unit: Kind = "head" if split == "attn_out" else "neuron"
    direct = total = readout.cotangent[None].to(trace.dtype)
    steps, workspace, active = list_steps(chain, readout), Workspace(), find_active(trace, readout)
    for index, _, above in bar(steps, desc="shares", unit="layer"):
        sublayers = trace.layers[index].block.sublayers
        both = sublayers.attn is not None and sublayers.mlp is not None
        explicit = chain.explicit_layer(index, workspace) if split is None and both else None
        if explicit is not None:
            total = _share_by_sublayer(shares, trace, (index, above), explicit, (direct, total), active)
            continue
        finder = UnitFinder(sublayers) if split else None
        graph = chain.layers[index].graph(collect=finder is not None and trace.biased[index], finder=finder)
        output, found = graph.points[above], None
        if finder is not None and split is not None:
            if split in graph.points:
                found = finder.projection(split, graph.points[split], graph.constants)
            if found is None:
                wholes.setdefault(finder.why_no_projection(split), []).append(index)
        for kind, value in list_additions(trace, index, above):
            end = graph.points.get(kind, output)
            if found is not None and kind == split:
                _add_units(shares, found, unit, index, (end, direct), (output, total))
            else:  # direct effect: direct . c; total effect: also through the rest of this layer and all later ones
                passing = _vjp(output, end, total) if kind == "attn_out" else total
                shares.add(kind, _dot(direct, value), _dot(passing, value), layer=index)
        total = _vjp(output, graph.points["resid_pre"], total)
    if wholes and sum(map(len, wholes.values())) == len(steps):
        raise OptionError(f"{trace.model.info.name}: {next(iter(wholes))}; use by='layer'")
    x = trace.layers[0].value[0]
    shares.add("embed", _dot(direct, x), _dot(total, x))
    shares.add_biases(readout.constants)
    shares.notes += [
        f"Not split in layers {', '.join(map(str, sorted(layers)))}: {why}." for why, layers in wholes.items()
    ]
    return shares


def _share_by_sublayer(
    shares: Shares,
    trace: Trace,
    step: tuple[int, str],
    explicit: ExplicitLayer,
    cotangents: tuple[Tensor, Tensor],
    active: slice,
) -> Float[Tensor, "1 T d"]:
    """Add the shares of the attention and the MLP of a layer up to a point, by explicit products.

    `cotangents` `[1, T, d]` at that point are those of direct and of total effects; returns that of total effects at
    the layer's input.
    """
    (index, above), (direct, total) = step, cotangents
    block, values = new_block(trace, 1), dict(list_additions(trace, index, above))
    block[0] = total[0]
    through = {"mlp_out": _dot(block, values["mlp_out"])} if "mlp_out" in values else {}
    if above != "resid_mid":  # what attention adds passes the MLP, too
        explicit.vjp(block.transpose(0, 1), active, active, None, "resid_mid", above)
    through["attn_out"] = _dot(block, values["attn_out"])
    for kind, value in values.items():
        shares.add(kind, _dot(direct, value), through[kind], layer=index)
    explicit.vjp(block.transpose(0, 1), active, active, None, "resid_pre", "resid_mid")
    return block


def share_by_token_and_layer(chain: Chain, readout: Readout, budget: int) -> Shares:
    """Compute the effects of tokens and biases along all paths whose last component is a given one, for each component.

    Components are swept in batches that fit the budget, from the last layer down.
    """
    trace, shares = chain.trace, Shares()
    direct = readout.cotangent[None].to(trace.dtype)
    steps = list_steps(chain, readout)
    ends = [(index, kind) for index, _, above in steps for kind, _ in list_additions(trace, index, above)]
    most = max(1, budget // (chain.column_bytes(Point("final")) + direct.nbytes))
    with bar(total=len(ends), desc="shares", unit="part") as progress_bar:
        for start in range(0, len(ends), most):
            some = ends[start : start + most]
            below = [step for step in steps if step[0] <= some[0][0]]
            active = find_active(trace, readout)
            block, biases = _pull_from_components(chain, direct, some, below, active, progress_bar)
            found = zip(some, _sum_by_token(trace, block).tolist(), biases.tolist(), strict=True)
            for (index, kind), row, bias in found:
                for token, share in enumerate(row):
                    shares.add(kind, share, layer=index, token=token)
                if any(trace.biased):
                    shares.add(kind, bias, layer=index)
    for token, share in enumerate(_sum_by_token(trace, direct)[0].tolist()):
        shares.add("embed", share, token=token)
    shares.add_biases(readout.constants)
    return shares


def _pull_from_components(
    chain: Chain,
    direct: Tensor,
    ends: list[tuple[int, Kind]],
    steps: list[tuple[int, str, str]],
    active: slice,
    progress_bar: tqdm,
) -> tuple[Float[Tensor, "n T d"], Float[Tensor, " n"]]:
    """Pull the target's gradient back from n components to the embeddings, and sum what biases on these paths add."""
    trace, workspace, done = chain.trace, Workspace(), 0
    block = new_block(trace, len(ends))
    biases = torch.zeros(len(ends), dtype=torch.float64, device=block.device)
    for index, below, above in steps:
        graph = chain.layers[index].graph(collect=trace.biased[index])
        if trace.biased[index] and done:
            block[:done], given = _pull(graph, graph.points[above], block[:done])
            biases[:done] += given.sum(1)
        elif done:
            chain.pull(block[:done], index, below, above, active, workspace)
        for kind in (kind for layer, kind in ends if layer == index):
            pulled, given = _pull(graph, graph.points.get(kind, graph.points[above]), direct)
            # a component without a point of its own is the layer's output minus its input, whose gradient is `direct`
            block[done], biases[done] = pulled[0] - direct[0] * (kind not in graph.points), given.sum()
            done += 1
            progress_bar.update()
    return block, biases


def pull_down(chain: Chain, readout: Readout) -> Iterator[tuple[int | None, str, Float[Tensor, "1 T d"]]]:
    """Pull the target's gradient down: what it is where each layer ends, and last, with None, at the embeddings.

    Yields the layer, the point at which it ends, and the gradient there, with all paths through later layers. Cost: one
    column backward.
    """
    trace, workspace, active = chain.trace, Workspace(), find_active(chain.trace, readout)
    block = new_block(trace, 1)
    block[0] = readout.cotangent
    for index, below, above in list_steps(chain, readout):
        yield index, above, block.clone()
        chain.pull(block, index, below, above, active, workspace)
    yield None, "embed", block


def list_additions(trace: Trace, index: int, above: str) -> list[tuple[Kind, Float[Tensor, "T d"]]]:
    """List what each component of a layer adds to the stream up to `above`; one `block` if they cannot be separated."""
    block = trace.layers[index].block.sublayers
    if above == "resid_mid":
        return [("attn_out", trace.value(Point("attn_out", index)))]
    if block.attn is not None and block.mlp is not None:
        both: tuple[Kind, ...] = ("attn_out", "mlp_out")
        return [(kind, trace.value(Point(kind, index))) for kind in both]
    after, before = trace.value(Point("resid_post", index)), trace.value(Point("resid_pre", index))
    kind: Kind = "attn_out" if block.attn is not None else "mlp_out" if block.mlp is not None else "block"
    return [(kind, after - before.to(after.device))]


def _add_units(shares: Shares, found: OutputProjection, kind: Kind, layer: int, *ends: tuple[Tensor, Tensor]) -> None:
    """Add the shares of a projection's heads or neurons, and of the biases after it.

    `ends` are pairs of a point in the layer's graph and its cotangent, for direct and for total effects.
    """
    parts = [found.source, *(leaf for _, leaf in found.behind)]
    shared, passing = (_weigh(end, parts, cotangent) for end, cotangent in ends)
    length, count = shared[0].numel() // shared[0].shape[-1], found.count
    units = [p[0].reshape(length, count, -1).sum((0, 2)) for p in (shared, passing)]
    for index, (share, through) in enumerate(zip(*(unit.tolist() for unit in units), strict=True)):
        shares.add(kind, share, through, layer=layer, index=index)
    for (name, _), share, through in zip(found.behind, shared[1:], passing[1:], strict=True):
        number = shares.number_bias(name)
        shares.add("bias", share.sum().item(), through.sum().item(), layer=layer, index=number)


def _weigh(output: Tensor, parts: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Multiply each part by its gradient in the product of the output with a cotangent, element by element."""
    pulled = grad(output, parts, cotangent.to(output), retain_graph=True, allow_unused=True)
    values = [part.detach().double() for part in parts]
    return [torch.zeros_like(v) if g is None else g.double() * v for g, v in zip(pulled, values, strict=True)]


def _pull(graph: Graph, output: Tensor, cotangents: Float[Tensor, "n T d"]) -> tuple[Tensor, Tensor]:
    """Return the vjp of cotangents to the layer's input `[n, T, d]`, and what each constant adds `[n, constants]`."""
    leaves = [leaf for _, leaf in graph.constants]
    x = graph.points["resid_pre"]
    given = cotangents.new_zeros(len(cotangents), len(leaves), dtype=torch.float64)
    if not output.requires_grad:
        return torch.zeros_like(cotangents), given
    block = cotangents.to(output)[:, None]
    pulled, *weights = grad(output, [x, *leaves], block, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, (weight, leaf) in enumerate(zip(weights, leaves, strict=True)):
        if weight is not None:
            given[:, i] = (weight.double() * leaf.detach().double()).reshape(len(given), -1).sum(1)
    return torch.zeros_like(cotangents) if pulled is None else pulled[:, 0].to(cotangents), given


def _weigh_lookups(graph: Graph, output: Tensor, cotangent: Float[Tensor, "1 T d"]) -> dict[str, Float[Tensor, " T"]]:
    """Sum the effects of each token's rows of further embedding tables, in float64."""
    found: dict[str, Tensor] = {}
    if graph.lookups and output.requires_grad:
        names, leaves = zip(*graph.constants, strict=True)
        for name, given in zip(names, _weigh(output, list(leaves), cotangent), strict=True):
            if name in graph.lookups:
                found[name] = found.get(name, 0.0) + given.flatten(2).sum((0, 2))
    return found


def _vjp(output: Tensor, source: Tensor, cotangent: Float[Tensor, "1 T d"]) -> Float[Tensor, "1 T d"]:
    (pulled,) = grad(output, source, cotangent.to(output), retain_graph=True, allow_unused=True)
    return torch.zeros_like(cotangent) if pulled is None else pulled.to(cotangent)


def _dot(cotangent: Float[Tensor, "1 T d"], value: Float[Tensor, "T d"]) -> float:
    return (cotangent[0].double() * value.to(cotangent.device).double()).sum().item()


def _sum_by_token(trace: Trace, cotangents: Float[Tensor, "n T d"]) -> Float[Tensor, "n T"]:
    """Multiply cotangents at the embeddings with the embeddings, token by token, in float64."""
    return torch.einsum("ntd,td->nt", cotangents.double(), trace.layers[0].value[0].double())


def new_block(trace: Trace, columns: int) -> Float[Tensor, "n T d"]:
    """Allocate a block of cotangents in the layout of sweeps: the columns of one position are one matrix."""
    return trace.layers[0].value.new_zeros(trace.length, columns, trace.width).transpose(0, 1)


def find_active(trace: Trace, readout: Readout) -> slice:
    """Find the positions on which the target can depend."""
    return slice(0, readout.position + 1 if trace.causal else trace.length)


def list_steps(chain: Chain, readout: Readout) -> list[tuple[int, str, str]]:
    """List the parts of layers from where a target is read down to the embeddings, as `Chain.steps` does."""
    layer, mid = divmod(readout.node, 2)
    end = Point("resid_mid", layer) if mid else Point("resid_post", layer - 1) if layer else Point("embed")
    return chain.steps(Point("embed"), end)[::-1]
