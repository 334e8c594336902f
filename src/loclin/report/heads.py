"""What is said of one attention head, and of a path of heads."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from loclin.analyses.attribution.heads import Head, Path
from loclin.report import run
from loclin.report.sheet import KEY, PAGE, Chip, Limits, Section, Sheet, describe, full_size
from loclin.report.table import Bar, Column, Table
from loclin.report.text import number, shortened, signed, token, visible, words


@describe.register
def describe_head(head: Head, _limits: Limits = PAGE) -> Sheet:
    """Say where a head looks, what it writes, and what it gives of the target."""
    shares = head.attends.tolist()
    table = _share_table(run.tokens(head), shares, ("attention", [f"{100 * p:.1f} %" for p in head.pattern.tolist()]))
    table.add("", Text("biases", "italic"), "", signed(head.bias), Bar(head.bias / _full(shares)))
    table.add("", Text("total", "bold"), "", Text(signed(head.share), "bold"), is_sum=True)
    triples = Table.of(Column("", "key"), Column("σ"), Column("writes", "words"), Column("reads", "words"))
    for i, triple in enumerate(head.triples):
        triples.add(f"{i + 1}", number(triple.value), words(triple.writes), words(triple.reads))
    return Sheet(
        title=f"{head.name}: {shortened(run.prompt(head))}",
        about="one attention head, at this prompt, as an exact linear map",
        chips=_chips(run.tokens(head), shares),
        key=KEY,
        lead=[_share(head.target, head.name, head.share)],
        sections=[
            Section("Tokens", "the attention it pays, and the parts of its share that it reads there", [table]),
            Section("What its map writes and reads", "its singular vectors, all tokens side by side", [triples]),
        ],
        warnings=head.warnings,
        run=run.run_of(head),
    )


@describe.register
def describe_path(path: Path, _limits: Limits = PAGE) -> Sheet:
    """Say what each token gives of the target along a path."""
    shares = path.shares.tolist()
    table = _share_table(run.tokens(path), shares)
    table.add("", Text("total", "bold"), Text(signed(sum(shares)), "bold"), is_sum=True)
    return Sheet(
        title=f"{path.name}: {shortened(run.prompt(path))}",
        about="one path through the model, at this prompt, as an exact linear map",
        chips=_chips(run.tokens(path), shares),
        key=KEY,
        lead=[_share(path.target, path.name, path.share)],
        sections=[Section("Tokens", "what each one's embedding gives by this path alone", [table])],
        warnings=path.warnings,
        run=run.run_of(path),
    )


def _full(shares: list[float]) -> float:
    return full_size((share, False) for share in shares)


def _chips(texts: list[str], shares: list[float]) -> list[Chip]:
    full = _full(shares)
    return [
        Chip(text, share / full, f"token {i} {visible(text)}: share {signed(share)}")
        for i, (text, share) in enumerate(zip(texts, shares, strict=True))
    ]


def _share(target: dict[str, Any], name: str, share: float) -> Text:
    line = Text.assemble((name, "bold"), " gives ", (signed(share), "bold"), f" of the {target['kind']} ")
    line.append_text(Text(", ").join(token(text, "bold green") for text in target["tokens"]))
    return line.append(f" {number(target['value'])}", "dim")


def _share_table(texts: list[str], shares: list[float], *more: tuple[str, list[str]]) -> Table:
    full = _full(shares)
    heads = [Column(name) for name, _ in more]
    table = Table.of(Column("", "key"), Column("token", "key"), *heads, Column("share"), Column("", "bar"))
    for i, (text, share) in enumerate(zip(texts, shares, strict=True)):
        table.add(str(i), token(text, "bold"), *(cells[i] for _, cells in more), signed(share), Bar(share / full))
    return table
