"""What attributions say: a target, its shares, and that they sum to it; one head, and its scores; a path of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby

from rich.text import Text

from loclin.analyses.attribution.heads import Head, Path
from loclin.analyses.attribution.result import Attribution, Kind, Share
from loclin.analyses.attribution.scores import AttentionScore
from loclin.report.run import prompt, run_of, tokens, wanted
from loclin.report.sheet import (
    KEY,
    PAGE,
    Block,
    Chip,
    Heat,
    Limits,
    Section,
    Shade,
    Sheet,
    describe,
    full_size,
    sheet_of,
)
from loclin.report.table import BAR, BEYOND, COUNTER, Bar, Cell, Column, Table
from loclin.report.text import error, number, percent, shortened, signed, token, visible, words
from loclin.report.units import full_group, group_table

LEVELS = {
    "token": ("Tokens", "what each token's embedding gives, by all ways"),
    "bias": ("Biases", "what each bias gives, by all ways"),
    "layer": ("Layers", "what each attention and each MLP writes into it, directly"),
    "head": ("Heads", "what each query head writes into it, directly"),
    "neuron": ("Neurons", "what each MLP neuron writes into it, directly"),
    "word": ("Words", "what the embeddings of each word's tokens give, by all ways"),
    "sentence": ("Sentences", "what the embeddings of each sentence's tokens give, by all ways"),
    "line": ("Lines", "what the embeddings of each line's tokens give, by all ways"),
    "turn": ("Turns", "what the embeddings of each chat turn's tokens give, by all ways"),
    "example": ("Examples", "what the embeddings of each example's tokens give, by all ways"),
    "group": ("Groups", "what the embeddings of each group's tokens give, by all ways"),
    "adapter": ("Adapters", "what each adapter gives by all ways on which it is the last; the rest is without any"),
    "token×layer": ("Tokens × layers", "what each token gives by way of each part as the last that writes"),
}
"""Each level's title, and what its shares are."""
_NAMES: dict[Kind, str] = {"embed": "embedding", "attn_out": "attention", "mlp_out": "MLP"}
_WORDS, _READS = 5, 2
_MOST = 80
"""Rows of a map of tokens, and of a table of them."""


@describe.register
def _describe_attribution(found: Attribution, limits: Limits = PAGE) -> Sheet:
    title, run = shortened(prompt(found)), run_of(found)
    level, note = LEVELS[found.by]
    by_token = found.by in ("token", "token×layer")
    chips, full = _token_chips(found, by_token) if not found.groups else _group_chips(found)
    goal, against = wanted(found.target), found.target.get("against")
    target = Text.assemble((f"{found.target['kind']} ", "green"), goal, (f" {number(found.value)}", "bold"))
    if against is not None:
        target.append(f" = {number(found.value + against['value'])} − {number(against['value'])}", "bold")
    if (probability := found.target.get("probability")) is not None:
        less = f" and {percent(against['probability'])}" if against is not None else ""
        target.append(f"   probability {percent(probability)}{less}", "dim")
    apart = "first, second: input tokens of one of the two answers alone; all others are in both"
    return sheet_of(
        found,
        "the model, at this prompt, as an exact linear map"
        if found.shared is None
        else "relevance that passes attention by its queries and keys too: not exact",
        [Section(level, note, _blocks(found, limits))],
        heading=Text.assemble(title, (" → ", "dim"), goal),
        chips=chips,
        key=KEY if by_token or found.groups else "",
        lead=[target],
        notes=[*([apart] if against is not None else []), *([run.gate] if run.facts else [])],
    )


def _blocks(found: Attribution, limits: Limits) -> list[Block]:
    """The shares as a map, where there is one, and as a table; and that they sum to the target."""
    if found.by == "token":
        table = _tokens(found, min(limits.tokens, _MOST))
    elif found.groups:
        table = _groups(found, min(limits.tokens, _MOST))
    else:
        table = _layers(found) if found.by == "layer" else _parts(found, limits.parts)
    maps = {"head": _head_map, "token×layer": _token_map, "adapter": _adapter_map}
    blocks: list[Block] = [maps[found.by](found)] if found.by in maps else []
    blocks += [table, Text(_sums(found), "bold")]
    if found.by == "adapter":
        lent = sum(part.share for part in found.parts if part.kind == "adapter")
        blocks.append(Text(f"all adapters {signed(lent)}, the model without them {signed(found.sum - lent)}", "bold"))
    if found.through is not None:
        through = "through: all of it that passes there, by later layers too; these overlap and do not sum up"
        blocks.append(Text(through, "dim"))
    return blocks


@describe.register
def _describe_score(found: AttentionScore, limits: Limits = PAGE) -> Sheet:
    texts, attention = tokens(found), found.pattern.tolist()
    full = full_size((share, i in found.by_query.sinks) for i, share in enumerate(attention))
    query, key = (token(texts[i], "bold") for i in (found.query, found.key))
    line = Text.assemble((found.name, "bold"), f" at {found.query} ", query, f" attends to {found.key} ", key)
    line.append(f" with {percent(found.probability)}: score {number(found.score)}")
    sides = (("query", found.by_query, "key"), ("key", found.by_key, "query"))
    sections = [
        Section(
            f"{LEVELS[shares.by][0]}: what the {side} reads",
            f"its shares of the score, with the {other} held",
            _blocks(shares, limits),
        )
        for side, shares, other in sides
    ]
    chips = [
        Chip(text, share / full, f"token {i} {visible(text)}: attention {percent(share)}")
        for i, (text, share) in enumerate(zip(texts, attention, strict=True))
    ]
    about = "why a head attends there: its score, exactly, from either side"
    run = run_of(found)
    notes = [run.gate] if run.facts else []
    return sheet_of(found, about, sections, kind=found.name, chips=chips, lead=[line], notes=notes)


def _token_chips(found: Attribution, by_token: bool) -> tuple[list[Chip], float]:
    shares = [0.0] * len(found.texts)
    for part in found.parts:
        if part.token is not None and by_token:
            shares[part.token] += part.share
    full = full_size((share, i in (*found.sinks, *found.skipped)) for i, share in enumerate(shares))
    return _chips(found.texts, shares, full, lambda i: _marks(found, i)), full


def _group_chips(found: Attribution) -> tuple[list[Chip], float]:
    """A chip for each group; those that are skipped, or hold a sink, do not set the full colour."""
    shares = [part.share for part in found.parts if part.kind == "group"]
    full = full_group(found.groups, shares, {*found.sinks, *found.skipped})
    marks = [
        [side for side in [found.side(group.positions[0])] if side]
        + ["skipped"] * (set(group.positions) <= set(found.skipped))
        for group in found.groups
    ]
    return _chips([group.name for group in found.groups], shares, full, lambda i: marks[i]), full


def _chips(
    texts: list[str], shares: list[float], full: float, marks: Callable[[int], list[str]] = lambda _: []
) -> list[Chip]:
    chips = []
    for i, (text, share) in enumerate(zip(texts, shares, strict=True)):
        about = "".join(f", {mark}" for mark in marks(i))
        chips.append(Chip(text, share / full, f"token {i} {visible(text)}{about}: share {signed(share)}", marks(i)))
    return chips


def _marks(found: Attribution, i: int) -> list[str]:
    """Say what is special about a position: an attention sink, skipped, of one span alone, where the target is read."""
    read = [*found.target.get("positions", [found.target["position"]])]
    read += found.target.get("against", {}).get("positions", [])
    return (
        [side for side in [found.side(i)] if side]
        + ["sink"] * (i in found.sinks)
        + ["skipped"] * (i in found.skipped)
        + ["reads" if found.target["kind"].startswith("score of") else "last"] * (len(read) == 1 and i in read)
        + ["predicts"] * (len(read) > 1 and i in read)
    )


def _sums(found: Attribution) -> str:
    several = f"{len(found)} shares sum" if len(found) > 1 else "1 share comes"
    return (
        f"{several} to {found.shares.sum().item():.6g}, the {found.target['kind']} is {found.value:.6g}: residual "
        f"{error(abs(found.residual))}, or {error(found.relative_residual)} of the sizes of what is summed"
    )


def _full(found: Attribution, parts: list[Share]) -> float:
    return full_size((part.share, part.token in found.sinks) for part in parts)


def _add_others(table: Table, found: Attribution, chosen: list[Share], full: float, *before: str) -> Table:
    """Sum up by kind what is not shown."""
    left: dict[Kind, list[float]] = {}
    kinds, shown = {part.kind for part in chosen}, {(part.name, part.token, part.index) for part in chosen}
    for part in found.parts:
        if (part.name, part.token, part.index) not in shown:
            left.setdefault(part.kind, []).append(part.share)
    for kind, shares in left.items():
        several, other = len(shares) > 1, kind in kinds
        name = _NAMES.get(kind, kind) + ("es" if kind == "bias" else "s") * several
        name = f"{len(shares)} " * (several or other) + "other " * other + name
        table.add(*before, Text(name, "italic"), signed(sum(shares)), Bar(sum(shares) / full))
    return table


def _tokens(found: Attribution, most: int) -> Table:
    chosen = sorted(found.top(most, "token"), key=lambda part: part.token or 0)
    full = _full(found, chosen)
    table = Table.of(COUNTER, Column("token", "key"), "share", BAR)
    for part in chosen:
        name = token(part.name, "bold", _marks(found, part.token or 0))
        table.add(str(part.token), name, signed(part.share), Bar(part.share / full))
    return _add_others(table, found, chosen, full, "")


def _groups(found: Attribution, most: int) -> Table:
    """A row for each of the groups of largest share, in the order of the prompt."""
    parts = [part for part in found.parts if part.kind == "group"]
    full = _group_chips(found)[1]
    table, shown = group_table(found.by, found.groups, [part.share for part in parts], full, found.skipped, most)
    chosen = [parts[i] for i in shown]
    return _add_others(table, found, chosen, full, "")


def _layers(found: Attribution) -> Table:
    """A row for each layer: its attention, its MLP, and what the larger of them writes; a block as its attention."""
    layers: dict[int, dict[str, Share]] = {}
    for part in found.parts:
        if part.layer is not None:
            layers.setdefault(part.layer, {})["attn_out" if part.kind == "block" else part.kind] = part
    table = Table.of(
        *(Column("layer", "key"), "attention", BAR, "MLP", BAR, "through"),
        Column("writes", "words"),
    )
    full = _full(found, found.parts)
    for layer, here in layers.items():
        cells: list[Cell] = [Text(str(layer), "dim")]
        for kind in ("attn_out", "mlp_out"):
            cells += [signed(here[kind].share), Bar(here[kind].share / full)] if kind in here else ["", ""]
        through = " ".join(signed(part.through or 0.0) for part in here.values())
        writes = max(here.values(), key=lambda part: abs(part.share)).writes or []
        table.add(*cells, Text(through, "dim"), words(writes, _WORDS))
    return _add_others(table, found, [part for part in found.parts if part.layer is not None], full)


def _parts(found: Attribution, top: int) -> Table:
    """The largest shares, whatever they are of."""
    chosen = found.top(top, found.unit)
    full = _full(found, chosen)
    matrix, reading, writing = found.by == "token×layer", found.by == "head", found.by in ("head", "neuron")
    table = Table.of(
        *(Column("part", "key"), "share", BAR),
        *["through"] * (found.through is not None),
        *[Column("token", "key")] * matrix,
        *[Column("reads", "words")] * reading,
        *[Column("writes", "words")] * writing,
    )
    for part in chosen:
        cells: list[Cell] = [Text(part.name, "bold"), signed(part.share), Bar(part.share / full)]
        cells += [] if part.through is None else [Text(signed(part.through), "dim")]
        if matrix:
            cells.append(Text("biases", "italic") if part.token is None else token(found.texts[part.token]))
        if reading:
            read = sorted(enumerate(part.attends or []), key=lambda one: -abs(one[1]))[:_READS]
            cells.append([token(found.texts[i]).append(f" {signed(share)}", "dim") for i, share in read])
        if writing:
            cells.append(words(part.writes or [], _WORDS))
        table.add(*cells)
    return _add_others(table, found, chosen, full)


def _head_map(found: Attribution) -> Heat:
    heads = [part for part in found.parts if part.kind == "head"]
    return head_heat({part.name: part.share for part in heads}, _full(found, heads), "head")


def _adapter_map(found: Attribution) -> Heat:
    """A map of layers by the modules that adapters are on."""
    parts = [part for part in found.parts if part.kind == "adapter"]
    split = [(part, *part.name.partition(".")[::2]) for part in parts]
    shares = {(layer, module): part.share for part, layer, module in split}
    modules = list(dict.fromkeys(module for *_, module in split))
    layers = list(dict.fromkeys(layer for _, layer, _ in split))[::-1]
    rows = [(layer, [(f"{layer}.{name}", shares.get((layer, name))) for name in modules]) for layer in layers]
    columns = [(Text(name.rpartition(".")[2]), 1) for name in modules]
    return heat(rows, columns, _full(found, parts), "module")


def _token_map(found: Attribution) -> Heat:
    """A map of tokens by parts: the tokens of largest share, and the biases."""
    matrix, names = found.matrix()
    shown = sorted(matrix[:-1].sum(1).abs().argsort(descending=True)[:_MOST].tolist())
    marked = ["".join(f" ({mark})" for mark in _marks(found, i)) for i in range(len(found.texts))]
    values = [(f"{i} {visible(found.texts[i], 20)}{marked[i]}", matrix[i]) for i in shown]
    hidden = [i for i in range(len(found.texts)) if i not in shown]
    if hidden:
        values.append((f"{len(hidden)} others", matrix[hidden].sum(0)))
    if matrix[-1].any():
        values.append(("biases", matrix[-1]))
    rows = [
        (text, [(f"{text} → {name}", share) for name, share in zip(names, row.tolist(), strict=True)])
        for text, row in values
    ]
    columns = [(Text(label), len(list(same))) for label, same in groupby(name.rpartition(".")[2] for name in names)]
    full = full_size((size, i in found.sinks) for i, size in enumerate(matrix[:-1].abs().amax(1).tolist()))
    return heat(rows, columns, full, "left: attention, right: MLP")


def head_heat(shares: Mapping[str, float], full: float, note: str) -> Heat:
    """A map of layers, the last one first, by heads, from numbers by their names: `L3H5`."""
    known = {tuple(map(int, name[1:].split("H"))) for name in shares}
    heads = range(1 + max((head for _, head in known), default=0))
    rows = [
        (f"layer {layer}", [(name, shares.get(name)) for name in (f"L{layer}H{head}" for head in heads)])
        for layer in sorted({layer for layer, _ in known}, reverse=True)
    ]
    return heat(rows, [(Text(str(head)), 1) for head in heads], full, note)


def heat(
    named: list[tuple[str, list[tuple[str, float | None]]]], columns: list[tuple[Text, int]], full: float, note: str
) -> Heat:
    """Colour shares by their size; each cell says what it is, and each row its sum."""
    rows, beyond = [], ""
    for name, cells in named:
        shades = [Shade(s if s is None else s / full, "" if s is None else f"{of}: {signed(s)}") for of, s in cells]
        shares = [share or 0.0 for _, share in cells]
        rows.append((Text(name), shades, Text(signed(sum(shares)))))
        if any(abs(share) > BEYOND * full for share in shares):
            beyond = "; outlined: more"
    about = f"Columns: {note}. Behind them: each row's sum. Full colour: {signed(full).lstrip('+')}{beyond}."
    return Heat(columns, rows, about)


@describe.register
def _describe_head(head: Head, _limits: Limits = PAGE) -> Sheet:
    shares = head.attends.tolist()
    full = full_size((share, False) for share in shares)
    table = Table.of(COUNTER, Column("token", "key"), "attention", "share", BAR)
    for i, (text, share, paid) in enumerate(zip(tokens(head), shares, head.pattern.tolist(), strict=True)):
        table.add(str(i), token(text, "bold"), percent(paid), signed(share), Bar(share / full))
    table.add("", Text("biases", "italic"), "", signed(head.bias), Bar(head.bias / full))
    table.add("", Text("total", "bold"), "", Text(signed(head.share), "bold"), is_sum=True)
    triples = Table.of(COUNTER, "σ", Column("writes", "words"), Column("reads", "words"))
    for i, triple in enumerate(head.triples):
        triples.add(f"{i + 1}", number(triple.value), words(triple.writes), words(triple.reads))
    sections = [
        Section(
            "Tokens",
            "the attention it pays, and the parts of its share that it reads there",
            [*_added_up(head, shares), table],
        ),
        Section("What its map writes and reads", "its singular vectors, all tokens side by side", [triples]),
    ]
    return _sheet_of(head, "one attention head, at this prompt, as an exact linear map", sections, shares, full)


@describe.register
def _describe_path(path: Path, _limits: Limits = PAGE) -> Sheet:
    shares = path.shares.tolist()
    full = full_size((share, False) for share in shares)
    table = Table.of(COUNTER, Column("token", "key"), "share", BAR)
    for i, (text, share) in enumerate(zip(tokens(path), shares, strict=True)):
        table.add(str(i), token(text, "bold"), signed(share), Bar(share / full))
    table.add("", Text("total", "bold"), Text(signed(sum(shares)), "bold"), is_sum=True)
    note = "what each one's embedding gives by this path alone"
    section = Section("Tokens", note, [*_added_up(path, shares), table])
    return _sheet_of(
        path, "one path through the model, at this prompt, as an exact linear map", [section], shares, full
    )


def _added_up(found: Head | Path, shares: list[float]) -> list[Block]:
    """A table of the groups that were asked for."""
    sums = [math.fsum(shares[i] for i in group.positions) for group in found.groups]
    table, _ = group_table("group", found.groups, sums, full_group(found.groups, sums, ()), (), _MOST)
    return [table] if found.groups else []


def _sheet_of(found: Head | Path, about: str, sections: list[Section], shares: list[float], full: float) -> Sheet:
    target = found.target
    line = Text.assemble((found.name, "bold"), " gives ", (signed(found.share), "bold"), f" of the {target['kind']} ")
    line.append_text(Text(", ").join(token(text, "bold green") for text in target["tokens"]))
    line.append(f" {number(target['value'])}", "dim")
    chips = _chips(tokens(found), shares, full)
    return sheet_of(found, about, sections, kind=found.name, chips=chips, key=KEY, lead=[line])
