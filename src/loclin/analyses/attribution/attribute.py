"""Exact attribution: a target of the frozen network as a sum of shares.

The residual stream is the sum of the embedding, every attention output and every MLP output. A target is linear in it:
`target = sum_c g . c`, with the target's gradient g and one term, the direct effect, for each component c. The vjp of g
down to the embeddings gives the total effect of each token and of each bias.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.adapters import check_adapters, share_by_adapter
from loclin.analyses.attribution.groups import UNITS, Group, Grouping, Skip, find_groups, find_skipped, name_group
from loclin.analyses.attribution.readout import Readout, read_sides, subtract
from loclin.analyses.attribution.result import Attribution, By, Kind, Share
from loclin.analyses.attribution.shares import (
    Shares,
    compute_shares,
    list_additions,
    share_by_component,
    share_by_source,
    share_by_token_and_layer,
)
from loclin.analyses.attribution.target import Target
from loclin.analyses.decode import decoder_at
from loclin.common.arguments import whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.freeze import SharedAttention
from loclin.maps.linearized import Linearized, question
from loclin.network.autograd import batched_jvp, grad
from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.network.units import UnitFinder

LEVELS: tuple[By, ...] = ("token", "layer", "head", "neuron", "bias", "token×layer")
"""What every model has shares of; beside these there are groups of tokens, see `loclin.analyses.attribution.groups`."""
_ALL: tuple[By, ...] = (*LEVELS, "adapter", *UNITS)
_SPELLINGS = {"tokenxlayer": "token×layer", "token*layer": "token×layer"}
_WORDS = 8
_SPLITS: dict[By, Kind] = {"head": "attn_out", "neuron": "mlp_out"}


@question
@with_progress
def attribute(
    lin: Linearized,
    target: Target = None,
    *,
    by: Grouping = "token",
    position: int = -1,
    skip: Skip | None = None,
    attention: str | SharedAttention = "frozen",
    in_words: int = 12,
    progress: Progress = True,
) -> Attribution:
    """Split a target into exact shares, which sum to it up to rounding (`Attribution.residual`).

    Cost: by token or bias one column backward, and two forward passes of each layer that has biases. By layer, head or
    neuron a graph of each layer (two forward passes) and two columns. By token × layer a graph of each layer and L
    columns, since the two columns of each layer go through the layers below it. Memory: one layer's graph; by token ×
    layer the budget, for as many of the 2 L columns at a time as fit (each batch builds its graphs again). If
    float32 rounds the sum by more than 5e-7, everything is computed again in float64.

    The difference of two spans is that of two prompts' targets: both are computed, and what belongs to the same token
    of the prompt, component or bias is subtracted. Each span's own tokens have their own shares. Cost: that of both.
    By adapter: two forward passes of each layer, and a column.

    Raises OptionError for an unknown `by`; for an invalid target (see
    `loclin.analyses.attribution.target.read_target`); for a model whose layers, heads or neurons cannot be told apart;
    PromptError for a position outside the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    target: a token's logit, by text or id; two tokens: the difference of their logits; two texts or `Span`s, of one
        token or several: the difference of their sums; `Margin`, `Neuron`, `Score`, `Direction`, or a vector `[d]` at
        `final`. None: the predicted token's logit minus the mean of all logits.
    by: one of
        `"token"`: the total effect of each input token (J_i x_i through the target) and of each bias.
        `"bias"`: the same, with all tokens as one share.
        `"layer"`: the direct effect of the embedding, of each attention and of each MLP. What later layers compute from
        a component's output counts as theirs.
        `"head"`: the same, with each attention split into its query heads and the biases after them.
        `"neuron"`: the same, with each MLP split into its neurons and the biases after them.
        `"token×layer"`: the effect of each token (and of the biases) along all paths on which a given attention or MLP
        is the last component that writes. Rows sum to `"token"`, columns to `"layer"`. `"token x layer"` and
        `"token*layer"` are the same.
        `"adapter"`: of a model with a LoRA, the effect along all paths on which the adapter of a given module is the
        last one; and of the embeddings and each bias, that along paths without any adapter.
        `"word"`, `"sentence"`, `"line"`, `"turn"` (of a chat), `"example"` (text between empty lines), a compiled
        pattern, or a mapping of names to positions: as `"token"`, with the shares of each group of tokens added up.
    position: the position at which the target is read.
    skip: `"special"` tokens, `"sink"`s, or positions: left out of rankings, and counted in the sum. By token or group.
    attention: `"shared"`, or a `loclin.SharedAttention` with other weights, lets part of the relevance through queries
        and keys. By token or group. The shares are then not exact: they miss the target by `Attribution.residual`, and
        the result warns of it. Cost: four forward passes of each layer, with whole attention probabilities.
    in_words: how many of the largest shares to put into words (not for tokens and biases).
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    chosen, in_words, tell = parse_level(by), whole("in_words", in_words, 0), steps(progress)
    grouped = chosen in (*UNITS, "group")
    if skip is not None and not (grouped or chosen == "token"):
        raise OptionError(f"skip is about tokens, and by={chosen!r} is not: leave it out")
    shared = _parse_attention(attention)
    if shared is not None and not (grouped or chosen == "token"):
        raise OptionError(f"shared attention has shares of tokens and groups of them, not by={chosen!r}")
    notes = check_adapters(lin, target) if chosen == "adapter" else []
    sides = read_sides(lin, target, position)
    prompt = lin if len(sides) == 2 else sides[0][0]
    skipped = find_skipped(prompt, skip)
    groups = find_groups(prompt, by, skipped) if grouped else []
    why = lin.trace.sequence.fallback_reason
    if chosen not in ("token", "bias", "adapter") and not grouped and why is not None:
        raise OptionError(f"{lin.model.info.name} has no layers to tell apart: {why}; use by='token' or by='bias'")
    tell(f"shares by {chosen}")
    level = "token" if grouped else chosen
    shares, *others = (_share_target(one, readout, level, shared) for one, readout in sides)
    longer, readout = sides[0]
    if others:
        shares = shares.minus(others[0], prompt.trace.length, longer.trace.length)
        readout = subtract(prompt, *sides)
        groups += _group_spans(sides, prompt.trace.length) if grouped else []
    if shared is not None:
        shares.notes.append(_note_missing(readout, shares, shared))
    if grouped:
        shares = shares.by_group([group.positions for group in groups])
    rows = shares.sort_rows()
    kinds, layers, indices, positions = (torch.tensor([row[i] for row in rows]) for i in range(4))
    given, passing = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (4, 5))
    found = Attribution(
        by=chosen,
        target=readout.to_dict(),
        shares=given,
        through=passing if chosen in ("layer", "head", "neuron") else None,
        kinds=kinds,
        layers=layers,
        indices=indices,
        positions=positions,
        biases=list(shares.biases),
        writes={},
        attends={},
        sinks=prompt.sinks,
        warnings=list(dict.fromkeys([*longer.warnings, *readout.warnings, *notes, *shares.notes])),
        provenance=replace(longer.jacobian(position=readout.position).provenance(), target=readout.at),
        groups=groups,
        skipped=skipped,
        shared=None if shared is None else asdict(shared),
    )
    return _put_into_words(sides, found, in_words)


def _share_target(lin: Linearized, readout: Readout, level: By, shared: SharedAttention | None) -> Shares:
    """The shares of one target; with shared attention queries and keys are live, too."""
    if shared is None:
        return compute_shares(lin, readout, lambda chain: _share(lin, chain, readout, level))
    options = replace(lin.trace.options, shared=shared)
    return share_by_source(Chain(lin.trace, options, explicit=False), readout, together=False)


def _group_spans(sides: list[tuple[Linearized, Readout]], shared: int) -> list[Group]:
    """A group for each span's own input tokens, where it has any, behind the prompt's `shared` ones."""
    groups, end = [], shared
    for lin, _ in sides:
        own = list(range(shared, lin.trace.length))
        if own:
            groups.append(Group(name_group(lin, own), list(range(end, end + len(own)))))
        end += len(own)
    return groups


def _share(lin: Linearized, chain: Chain, readout: Readout, level: By) -> Shares:
    if level == "adapter":
        return share_by_adapter(chain, readout)
    if level in ("token", "bias"):
        return share_by_source(chain, readout, together=level == "bias")
    if level == "token×layer":
        return share_by_token_and_layer(chain, readout, lin.allowance.spare)
    return share_by_component(chain, readout, _SPLITS.get(level))


def _parse_attention(attention: str | SharedAttention) -> SharedAttention | None:
    if attention == "frozen":
        return None
    if attention == "shared":
        return SharedAttention()
    if not isinstance(attention, SharedAttention):
        raise OptionError(f"attention={attention!r}: choose frozen, shared, or give a SharedAttention")
    return attention


def _note_missing(readout: Readout, shares: Shares, shared: SharedAttention) -> str:
    """How far shares through queries and keys miss the target."""
    missed = readout.value - math.fsum(row[4] for row in shares.rows)
    return (
        f"attention is shared (queries {shared.query:g}, keys {shared.key:g}, values {shared.value:g}): these shares "
        f"are not exact, and miss the target by {missed:+.4g} of {readout.value:.4g}"
    )


def parse_level(by: Grouping) -> By:
    """Parse the name of a level, in any of its spellings; OptionError for an unknown one."""
    if not isinstance(by, str):
        return "group"
    plain = by.replace(" ", "")
    plain = _SPELLINGS.get(plain, plain)
    for level in _ALL:
        if plain == level:
            return level
    raise OptionError(f"by={by!r}: choose one of {', '.join(_ALL)}")


def _put_into_words(sides: list[tuple[Linearized, Readout]], found: Attribution, most: int) -> Attribution:
    """Add the words of the `most` largest shares to an attribution by layer, head or neuron, and where heads read.

    The words are the tokens whose logits the component's output raises most, through the frozen final norm, wherever
    the target is read; where it is read in both prompts of a difference, once. Cost: for each side a graph of each
    layer that has such a share, one column of that layer for each, and one product with the output head.
    """
    (lin, readout), *_ = sides
    if found.through is None or readout.node != 2 * lin.trace.n_layers:
        return found
    chosen = {i: found.parts[i] for i in found.ranking(most, found.unit) if found.parts[i].kind != "bias"}
    if not chosen:
        return found
    final, attends, behind = torch.zeros(()), dict[str, Tensor](), 0
    for sign, (own, end) in zip((1, -1), sides, strict=False):
        written, reads = _write(own, end, chosen)
        length = own.trace.length
        shared = length if sign > 0 else found.target["against"]["shared"]
        new = [i for i, at in enumerate(end.positions) if sign > 0 or at >= shared or at not in readout.positions]
        final = final.to(written) + written[:, new].sum(1)
        places = [*range(shared), *range(behind, behind + length - shared)]
        for i, row in reads.items():
            whole_row = attends.setdefault(i, torch.zeros(len(found.texts), dtype=torch.float64))
            whole_row[places] += sign * torch.tensor(row, dtype=torch.float64)
        behind = length
    words = decoder_at(lin, readout.position).writes(final, _WORDS)
    return replace(
        found,
        writes={str(i): row for i, row in zip(chosen, words, strict=True)},
        attends={i: row.tolist() for i, row in attends.items()},
    )


def _write(
    lin: Linearized, readout: Readout, chosen: dict[int, Share]
) -> tuple[Float[Tensor, "n positions d"], dict[str, list[float]]]:
    """What each of n components writes into `final` where the target is read, and where heads read."""
    written, attends = dict[int, Tensor](), dict[str, list[float]]()  # written: [positions, d]
    for layer in dict.fromkeys(part.layer for part in chosen.values()):
        here = {i: part for i, part in chosen.items() if part.layer == layer}
        if layer is None:
            written |= dict.fromkeys(here, lin.embeddings[list(readout.positions)])
        else:
            _describe_layer(lin, readout, layer, here, written, attends)
    together = torch.stack([written[i].to(lin.embeddings) for i in chosen])
    return lin.chain.norm(Point("final"), list(readout.positions)).jvp(together), attends


def _describe_layer(
    lin: Linearized,
    readout: Readout,
    layer: int,
    parts: dict[int, Share],
    written: dict[int, Tensor],
    attends: dict[str, list[float]],
) -> None:
    """Find what some components of one layer write at the target's positions, and where its heads read."""
    values = dict(list_additions(lin.trace, layer, "resid_post"))
    at = list(readout.positions)
    written |= {i: values[part.kind][at] for i, part in parts.items() if part.kind in values}
    units = {i: part for i, part in parts.items() if part.kind not in values}
    if not units:
        return
    finder = UnitFinder(lin.trace.layers[layer].block.sublayers)
    graph = lin.chain.layers[layer].graph(collect=lin.trace.biased[layer], finder=finder)
    kind = "attn_out" if next(iter(units.values())).kind == "head" else "mlp_out"
    output, x = graph.points[kind], graph.points["resid_pre"]
    found = finder.projection(kind, output, graph.constants)
    assert found is not None  # the attribution has split it before
    push, source = batched_jvp(output, found.source), found.source
    for i, part in units.items():
        written[i] = push(found.isolate(source.detach(), part.index or 0)[None])[0, 0, at]
        if part.kind == "head":
            (weights,) = grad(output, source, readout.cotangent[None].to(output), retain_graph=True)
            own = found.isolate(weights, part.index or 0)
            (pulled,) = grad(source, x, own, retain_graph=True)
            attends[str(i)] = (pulled.double() * x.detach().double()).sum(-1)[0].tolist()
