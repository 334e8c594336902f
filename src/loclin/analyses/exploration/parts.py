"""The parts of the final hidden state: what tokens and biases give it by way of each component, and what heads write.

All are vectors behind the frozen final norm, so that a part's share of a logit is one product with a row of the output
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.shares import list_additions
from loclin.analyses.intervene import LayerParts
from loclin.common.brief import brief
from loclin.common.progress import bar
from loclin.common.sums import relative_error
from loclin.maps.layer_maps import push_biases
from loclin.maps.linearized import Linearized
from loclin.network.autograd import batched_jvp
from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.network.prefix import push_embeddings

_ROUNDING = 1e-5
"""If the parts miss the final hidden state by more, they are computed again in float64."""


@dataclass(frozen=True)
class Parts:
    """The final hidden state as a sum: `cells` `[R + 1, C, d]` of R groups of tokens and of biases by C components."""

    components: list[str]
    cells: Float[Tensor, "R C d"]
    error: float  # by how much the sum misses the state, relative to it

    __repr__ = brief


def find_parts(lin: Linearized, position: int, groups: Sequence[Sequence[int]]) -> Parts:
    """Split the final hidden state by groups of tokens and by components; in float64 if float32 rounds it too much.

    Cost: a column for each group, and one for the biases.
    """
    found, allowed = _find(lin.chain, position, groups, lin.allowance.spare), lin.allowance
    if found.error <= _ROUNDING or lin.trace.dtype != torch.float32:
        return found
    if 2 * (allowed.kept + allowed.coefficients) + allowed.work <= allowed.spare:
        return _find(Chain(lin.trace.double()), position, groups, allowed.spare)
    return found


def _find(chain: Chain, position: int, groups: Sequence[Sequence[int]], spare: int) -> Parts:
    trace = chain.trace
    with bar(total=len(groups) * trace.n_layers, desc="parts", unit="column") as progress:
        pushed = push_embeddings(chain, position, groups, spare, progress.update)
    biases = push_biases(chain) if any(trace.biased) else [{} for _ in pushed]
    x = trace.layers[0].value[0]
    own = torch.stack([x[position] if position in group else torch.zeros_like(x[0]) for group in groups])
    columns = {"embed": [*own, torch.zeros_like(x[0])]}
    for layer, (by_group, by_bias) in enumerate(zip(pushed, biases, strict=True)):
        for name, values in by_group.items():
            kind = name if name != "block" else list_additions(trace, layer, "resid_post")[0][0]
            columns[f"{kind}.{layer}"] = [*values.to(x), _bias(by_bias, name, position).to(x) if by_bias else 0 * x[0]]
    norm = chain.norm(Point("final"), position)
    stacked = torch.stack([torch.stack(column) for column in columns.values()], dim=1)
    cells = norm.jvp(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
    if constants := norm.constants():
        last = torch.zeros_like(cells[:, :1])
        last[-1, 0] = sum(constants.values())
        cells, columns = torch.cat([cells, last], dim=1), columns | {"norm": []}
    final = trace.final[0, position].double()
    error = relative_error(cells.double().sum((0, 1)).to(final) - final, final)
    return Parts(list(columns), cells, error)


def _bias(at: dict[str, Tensor], name: str, position: int) -> Float[Tensor, " d"]:
    """What the biases so far make of a component at a position."""
    if name == "block":
        return at["resid_post"][position] - at["resid_pre"][position].to(at["resid_post"])
    return at[name][position]


def find_heads(lin: Linearized, position: int) -> tuple[list[str], Float[Tensor, "N d"], list[int]]:
    """Find what each query head writes into the final hidden state, directly; their names; and layers without heads.

    Cost: a graph of each layer, and a column of its output projection for each head.
    """
    trace, names, without = lin.trace, list[str](), list[int]()
    written: list[Tensor] = [torch.zeros(0, trace.width, dtype=trace.dtype, device=lin.embeddings.device)]
    for layer in bar(range(trace.n_layers), desc="heads", unit="layer"):
        parts = LayerParts(lin, layer)
        found = parts.projection("attn_out")
        if found is None:
            without.append(layer)
            continue
        push, units = batched_jvp(parts.graph.points["attn_out"], found.source), found.source.detach()
        for head in range(found.count):
            names.append(f"L{layer}H{head}")
            written.append(push(found.isolate(units, head)[None])[:, 0, position].to(written[0]))
    return names, lin.chain.norm(Point("final"), position).jvp(torch.cat(written)), without
