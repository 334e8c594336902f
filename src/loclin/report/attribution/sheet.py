"""What an attribution says: the target, its shares, and that they sum to it."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.attribution.result import Attribution, Share
from loclin.report.attribution.labels import LEVELS, by_layer, marks, others, quantity, reads, sums, target_tokens
from loclin.report.run import prompt, run_of
from loclin.report.sheet import KEY, PAGE, Block, Chip, Heat, Limits, Section, Shade, Sheet, describe, full_size
from loclin.report.table import BEYOND, Bar, Cell, Column, Table
from loclin.report.text import number, percent, shortened, signed, token, visible, words

_WORDS = 5
_MOST = 80
"""Rows of a map of tokens, and of a table of them."""


@describe.register
def describe_attribution(found: Attribution, limits: Limits = PAGE) -> Sheet:
    """Say what an attribution shows."""
    title, run = shortened(prompt(found)), run_of(found)
    level, note = LEVELS[found.by]
    most = min(limits.tokens, _MOST)
    table = {"token": lambda: _tokens(found, most), "layer": lambda: _layers(found)}.get(found.by)
    blocks: list[Block] = [*_maps(found), table() if table else _parts(found, limits.parts), Text(sums(found), "bold")]
    if found.through is not None:
        through = "through: all of it that passes there, by later layers too; these overlap and do not sum up"
        blocks.append(Text(through, "dim"))
    target = _target(found)
    return Sheet(
        title=title,
        about="the model, at this prompt, as an exact linear map",
        heading=Text.assemble(title, (" → ", "dim"), _wanted(found)),
        chips=_chips(found),
        key=KEY if found.by in ("token", "token×layer") else "",
        lead=[target],
        sections=[Section(level, note, blocks)],
        notes=[] if run is None else [run.gate],
        warnings=found.warnings,
        run=run,
    )


def _chips(found: Attribution) -> list[Chip]:
    """The prompt's tokens, coloured by their shares where they are known."""
    shares = [0.0] * len(found.texts)
    for part in found.parts:
        if part.token is not None and found.by in ("token", "token×layer"):
            shares[part.token] += part.share
    full = full_size((share, i in found.sinks) for i, share in enumerate(shares))
    chips = []
    for i, (text, share) in enumerate(zip(found.texts, shares, strict=True)):
        special = marks(found, i)
        title = f"token {i} {visible(text)}{''.join(f', {mark}' for mark in special)}: share {signed(share)}"
        chips.append(Chip(text, share / full, title, special))
    return chips


def _wanted(found: Attribution) -> Text:
    """The tokens of the target, and the signs between them."""
    line = Text()
    for i, piece in enumerate(target_tokens(found)):
        line.append_text(Text(piece) if i % 2 else token(piece, "bold green"))
    return line


def _target(found: Attribution) -> Text:
    line = Text.assemble((f"{quantity(found)} ", "green"), _wanted(found), (f" {number(found.value)}", "bold"))
    probability = found.target.get("probability")
    return line if probability is None else line.append(f"   probability {percent(probability)}", "dim")


def _full(found: Attribution, parts: list[Share]) -> float:
    return full_size((part.share, part.token in found.sinks) for part in parts)


def _add_others(table: Table, found: Attribution, chosen: list[Share], full: float, *before: str) -> Table:
    for name, share in others(found, chosen):
        table.add(*before, Text(name, "italic"), signed(share), Bar(share / full))
    return table


def _tokens(found: Attribution, most: int) -> Table:
    chosen = sorted(found.top(most, "token"), key=lambda part: part.token or 0)
    full = _full(found, chosen)
    table = Table.of(Column("", "key"), Column("token", "key"), Column("share"), Column("", "bar"))
    for part in chosen:
        name = token(part.name, "bold", marks(found, part.token or 0))
        table.add(str(part.token), name, signed(part.share), Bar(part.share / full))
    return _add_others(table, found, chosen, full, "")


def _layers(found: Attribution) -> Table:
    """A row for each layer: its attention, its MLP, and what the larger of them writes."""
    table = Table.of(
        Column("layer", "key"),
        Column("attention"),
        Column("", "bar"),
        Column("MLP"),
        Column("", "bar"),
        Column("through"),
        Column("writes", "words"),
    )
    full = _full(found, found.parts)
    for layer, here in by_layer(found).items():
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
    passing, matrix, reading = found.through is not None, found.by == "token×layer", found.by == "head"
    table = Table.of(
        Column("part", "key"),
        Column("share"),
        Column("", "bar"),
        *[Column("through")] * passing,
        *[Column("token", "key")] * matrix,
        *[Column("reads", "words")] * reading,
        *[Column("writes", "words")] * (found.by in ("head", "neuron")),
    )
    for part in chosen:
        cells: list[Cell] = [Text(part.name, "bold"), signed(part.share), Bar(part.share / full)]
        cells += [] if part.through is None else [Text(signed(part.through), "dim")]
        if matrix:
            cells.append(Text("biases", "italic") if part.token is None else token(found.texts[part.token]))
        if reading:
            cells.append([token(text).append(f" {signed(share)}", "dim") for text, share in reads(found, part)])
        if found.by in ("head", "neuron"):
            cells.append(words(part.writes or [], _WORDS))
        table.add(*cells)
    return _add_others(table, found, chosen, full)


def _maps(found: Attribution) -> list[Block]:
    """What pages show besides: all heads, and all tokens by all parts, as coloured cells."""
    return {"head": _head_map, "token×layer": _token_map}.get(found.by, lambda _: [])(found)


def _head_map(found: Attribution) -> list[Block]:
    """A map of layers by heads."""
    heads = [part for part in found.parts if part.kind == "head"]
    shares = {(part.layer, part.index): part.share for part in heads}
    count = 1 + max((part.index or 0 for part in heads), default=0)
    rows = []
    for layer in sorted({part.layer for part in heads if part.layer is not None}, reverse=True):
        named = [(f"L{layer}H{head}", shares.get((layer, head))) for head in range(count)]
        rows.append((Text(f"layer {layer}"), named))
    return [_heat(rows, [(Text(str(head)), 1) for head in range(count)], _full(found, heads), "head")]


def _token_map(found: Attribution) -> list[Block]:
    """A map of tokens by parts: the tokens of largest share, and the biases."""
    matrix, names = found.matrix()
    shown = sorted(matrix[:-1].sum(1).abs().argsort(descending=True)[:_MOST].tolist())
    values = [(f"{i} {visible(found.texts[i], 20)}{_bracketed(marks(found, i))}", matrix[i]) for i in shown]
    hidden = [i for i in range(len(found.texts)) if i not in shown]
    if hidden:
        values.append((f"{len(hidden)} others", matrix[hidden].sum(0)))
    if matrix[-1].any():
        values.append(("biases", matrix[-1]))
    rows = [
        (Text(text), [(f"{text} → {name}", share) for name, share in zip(names, row.tolist(), strict=True)])
        for text, row in values
    ]
    columns: list[tuple[Text, int]] = []
    for label in (name.rpartition(".")[2] for name in names):
        if columns and columns[-1][0].plain == label:
            columns[-1] = (columns[-1][0], columns[-1][1] + 1)
        else:
            columns.append((Text(label), 1))
    full = full_size((size, i in found.sinks) for i, size in enumerate(matrix[:-1].abs().amax(1).tolist()))
    return [_heat(rows, columns, full, "left: attention, right: MLP")]


def _bracketed(special: list[str]) -> str:
    return "".join(f" ({mark})" for mark in special)


def _heat(
    rows: list[tuple[Text, list[tuple[str, float | None]]]], columns: list[tuple[Text, int]], full: float, note: str
) -> Heat:
    """Colour shares by their size; each cell says what it is, and each row its sum."""
    shares = [share for _, cells in rows for _, share in cells]
    beyond = "; outlined: more" if any(abs(share or 0.0) > BEYOND * full for share in shares) else ""
    return Heat(
        columns,
        [
            (
                name,
                [
                    Shade(None) if share is None else Shade(share / full, f"{title}: {signed(share)}")
                    for title, share in cells
                ],
                Text(signed(sum(share or 0.0 for _, share in cells))),
            )
            for name, cells in rows
        ],
        f"Columns: {note}. Behind them: each row's sum. Full colour: {signed(full).lstrip('+')}{beyond}.",
    )
