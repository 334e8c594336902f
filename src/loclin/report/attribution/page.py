"""Attributions as HTML that needs nothing else: a page for a file, a fragment for a notebook. No scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from string import Template

from loclin.analyses.attribution.result import Attribution, Share
from loclin.report import html as parts
from loclin.report.assets import asset
from loclin.report.heat import BEYOND, heat_map
from loclin.report.labels import LEVELS, by_layer, full_size, marks, others, quantity, reads, target_tokens, verdict
from loclin.report.sheet import shortened
from loclin.report.text import gate_note, number, percent, signed, visible
from loclin.results.files import write_text

TOP = 40
"""Rows of a table of the largest shares."""
_WORDS = 6


def attribution_html(found: Sequence[Attribution]) -> str:
    """Write attributions of one target as one self-contained page, a section for each."""
    first = found[0]
    css = asset("page.css", "attribution.css")
    return Template(asset("attribution.html")).substitute(
        css=css,
        title=escape(shortened(first.provenance.text if first.provenance else "")),
        target=_target(first),
        head=_head(found),
        warnings="".join(dict.fromkeys(parts.warnings(one) for one in found)),
        sections="".join(f"<section>{_section(one)}</section>" for one in found),
        settings=_settings(first),
    )


def write_attribution(found: Sequence[Attribution], path: str | os.PathLike[str]) -> None:
    """Write the page to a file, whole or not at all.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    write_text(path, attribution_html(found))


def attribution_fragment(found: Attribution) -> str:
    """Write an attribution as a piece of HTML for a notebook's output."""
    css = asset("notebook.css", "attribution.css")
    head = f'<div class="chips">{_chips(found)}</div><p>{_target(found)}</p>{_gate(found)}'
    return (
        f'<div class="loclin attribution"><style>{css}</style>{head}{parts.warnings(found)}'
        f'<div class="scroll">{_section(found)}</div></div>'
    )


def _head(found: Sequence[Attribution]) -> str:
    """The prompt's chips, coloured by the tokens' shares where they are known."""
    by_token = next((one for one in found if one.by in ("token", "token×layer")), found[0])
    keys = ['<span class="swatch sink"></span> attention sink · full colour: the largest share of a word']
    if by_token.by in ("token", "token×layer"):
        keys[:0] = ['<span class="swatch neg"></span> lowers it', '<span class="swatch pos"></span> raises it']
    return f'<div class="chips">{_chips(by_token)}</div><p class="key">{" ".join(keys)}</p>{_gate(found[0])}'


def _gate(found: Attribution) -> str:
    known = found.provenance
    return "" if known is None else f'<p class="note">{escape(gate_note(known.gate))}</p>'


def _chips(found: Attribution) -> str:
    shares = [0.0] * len(found.texts)
    for part in found.parts:
        if part.token is not None and found.by in ("token", "token×layer"):
            shares[part.token] += part.share
    words = [abs(share) for i, share in enumerate(shares) if i not in found.sinks]
    full = max(words, default=0.0) or 1.0
    return "".join(
        parts.chip(
            text,
            shares[i] / full,
            f"token {i} {visible(text)}{''.join(f', {mark}' for mark in marks(found, i))}: share {signed(shares[i])}",
            ("chip", *marks(found, i)),
        )
        for i, text in enumerate(found.texts)
    )


def _target(found: Attribution) -> str:
    pieces = "".join(
        escape(piece) if i % 2 else f'<span class="word">{parts.token(piece, 40)}</span>'
        for i, piece in enumerate(target_tokens(found))
    )
    probability = found.target.get("probability")
    likely = "" if probability is None else f", probability {percent(probability)}"
    return f"{pieces} <small>{escape(quantity(found))} {number(found.value)}{likely}</small>"


def _section(found: Attribution) -> str:
    name, note = LEVELS[found.by]
    draw = {"token": _tokens, "layer": _layers, "head": _heads, "token×layer": _matrix}.get(found.by, _largest)
    said = f"{note[0].upper()}{note[1:]}. {verdict(found)}."
    if found.through is not None:
        said += " Through: all of it that passes there, by later layers too; these overlap and do not sum up."
    drawn = draw(found)
    if " beyond" in drawn:
        said += " An arrow at a bar's end: longer than drawn." if 'class="balance"' in drawn else ""
    return f'<h2>{name}</h2><p class="note">{escape(said)}</p>{drawn}'


def _balance(share: float, full: float) -> str:
    """Draw a bar; an arrow at its end says that it is longer."""
    side, size = "neg" if share < 0 else "pos", abs(share) / full
    side += " beyond" if size > BEYOND else ""
    width = 50 * min(size, 1.0)
    return f'<td><span class="balance"><span class="{side}" style="width:{width:.1f}%"></span></span></td>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    table = f'<table class="shares"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _number(text: str) -> str:
    return f'<td class="num">{text}</td>'


def _words(part: Share) -> str:
    words = "".join(f'<span class="word">{parts.token(text, 24)}</span>' for text, _ in (part.writes or [])[:_WORDS])
    return f'<td class="words">{words}</td>'


def _name(found: Attribution, part: Share) -> str:
    if part.kind != "token" or part.token is None:
        return f'<th scope="row">{escape(part.name)}</th>'
    tags = "".join(f' <span class="tag">{mark}</span>' for mark in marks(found, part.token))
    return f'<th scope="row"><span class="word">{parts.token(part.name, 24)}</span>{tags}</th>'


def _listed(found: Attribution, chosen: list[Share]) -> str:
    """A table of some shares, and of the sums of all others."""
    full = full_size(found, chosen)
    passing, reading = found.through is not None, bool(found.attends)
    heads = [
        "",
        "part",
        "share",
        "",
        *["through"] * passing,
        *["reads most at"] * reading,
        "writes" * bool(found.writes),
    ]
    rows = []
    for part in chosen:
        row = [_number("" if part.token is None else str(part.token)), _name(found, part)]
        row += [_number(signed(part.share)), _balance(part.share, full)]
        row += [_number(signed(part.through or 0.0))] * passing
        if reading:
            at = (f'<span class="word">{parts.token(text, 20)}</span> {signed(s)}' for text, s in reads(found, part))
            row.append(f"<td>{' '.join(at)}</td>")
        rows.append([*row, _words(part)])
    for name, share in others(found, chosen):
        rows.append(
            [_number(""), f'<th scope="row"><em>{name}</em></th>', _number(signed(share)), _balance(share, full)]
        )
    return _table(heads, rows)


def _largest(found: Attribution) -> str:
    return _listed(found, found.top(TOP, found.unit))


def _tokens(found: Attribution) -> str:
    """Every token of a short prompt, of a long one those with the largest shares; then the largest biases."""
    tokens = sorted(found.top(2 * TOP, "token"), key=lambda part: part.token or 0)
    return _listed(found, [*tokens, *found.top(8, "bias")])


def _layers(found: Attribution) -> str:
    """A row for each layer: its attention, its MLP, and what the larger of them writes."""
    full, rows = full_size(found, found.parts), []
    for layer, here in by_layer(found).items():
        row = [_number(str(layer))]
        for kind in ("attn_out", "mlp_out"):
            part = here.get(kind)
            row += (
                ["<td></td>"] * 3
                if part is None
                else [_number(signed(part.share)), _balance(part.share, full), _number(signed(part.through or 0.0))]
            )
        rows.append([*row, _words(max(here.values(), key=lambda part: abs(part.share)))])
    for name, share in others(found, [part for part in found.parts if part.layer is not None]):
        rows.append([f'<th scope="row"><em>{name}</em></th>', _number(signed(share)), _balance(share, full)])
    return _table(["layer", "attention", "", "through", "MLP", "", "through", "writes (the larger)"], rows)


def _heads(found: Attribution) -> str:
    """A map of layers by heads, and the largest shares."""
    heads = [part for part in found.parts if part.kind == "head"]
    layers = sorted({part.layer for part in heads if part.layer is not None}, reverse=True)
    full = full_size(found, heads)
    values = {(part.layer, part.index): part.share for part in heads}
    count = 1 + max((part.index or 0 for part in heads), default=0)
    rows = [(f"layer {layer}", [values.get((layer, head)) for head in range(count)]) for layer in layers]
    names = [[f"L{layer}H{head}" for head in range(count)] for layer in layers]
    columns = [(str(head), 1) for head in range(count)]
    return heat_map(rows, columns, names, full, "head") + _largest(found)


def _matrix(found: Attribution) -> str:
    """A map of tokens by parts: the tokens of largest share, and the biases."""
    matrix, names = found.matrix()
    sums = matrix[:-1].sum(1).abs()
    shown = sorted(sums.argsort(descending=True)[: 2 * TOP].tolist())
    texts = [f"{i} {visible(found.texts[i], 20)}{''.join(f' ({m})' for m in marks(found, i))}" for i in shown]
    rows = [(text, matrix[i].tolist()) for text, i in zip(texts, shown, strict=True)]
    if len(shown) < len(found.texts):
        hidden = [i for i in range(len(found.texts)) if i not in shown]
        rows.append((f"{len(hidden)} others", matrix[hidden].sum(0).tolist()))
    if matrix[-1].any():
        rows.append(("biases", matrix[-1].tolist()))
    words = [i for i in range(len(found.texts)) if i not in found.sinks]
    full = matrix[words].abs().max().item() if words else matrix.abs().max().item()
    columns: list[tuple[str, int]] = []
    for name in names:
        label = name.rpartition(".")[2]
        if columns and columns[-1][0] == label:
            columns[-1] = (label, columns[-1][1] + 1)
        else:
            columns.append((label, 1))
    titles = [[f"{text} → {name}" for name in names] for text, _ in rows]
    return heat_map(rows, columns, titles, full or 1.0, "left: attention, right: MLP")


def _settings(found: Attribution) -> str:
    known = found.provenance
    if known is None:
        return ""
    facts = {f"model {name}": value for name, value in known.model.to_dict().items() if value is not None}
    facts |= {"gate": known.gate, "precision": known.precision, "position": found.target["position"]} | known.versions
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
