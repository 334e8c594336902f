"""How alike the tokens' maps are: the most similar pairs, and all of them as coloured cells."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.similarity import Similarity
from loclin.report import run
from loclin.report.sheet import PAGE, Block, Chip, Heat, Limits, Section, Shade, Sheet, describe, left_out
from loclin.report.table import Column, Table
from loclin.report.text import shortened, signed, token, visible

_MOST = 64
"""Tokens of a prompt up to which there is a coloured cell for each pair."""


@describe.register
def describe_similarity(found: Similarity, limits: Limits = PAGE) -> Sheet:
    """Show the pairs whose maps are most alike, and the cosines of all pairs as coloured cells."""
    rows = sorted(zip(*found.table().values(), strict=True), key=lambda row: -row[-1])
    pairs = Table.of(Column("", "key"), Column("token", "key"), Column(""), Column("other", "words"), Column("cosine"))
    for i, text, j, other, cosine in rows[: limits.parts]:
        pairs.add(str(i), token(text, "bold"), str(j), token(other, "bold"), signed(cosine))
    blocks: list[Block] = [pairs, *left_out(len(rows) - limits.parts)]
    texts = run.tokens(found)
    return Sheet(
        title=f"similarity: {shortened(run.prompt(found))}",
        about="how alike the tokens' exact maps are, at this prompt",
        chips=[Chip(text) for text in texts],
        sections=[
            Section("Pairs of tokens", "the cosine of their maps, the most alike first", blocks),
            *([Section("All pairs", "", [_matrix(found, texts)])] * (len(texts) <= _MOST)),
        ],
        warnings=found.warnings,
        run=run.run_of(found),
    )


def _matrix(found: Similarity, texts: list[str]) -> Heat:
    return Heat(
        [(token(text), 1) for text in texts],
        [
            (
                Text.assemble(f"{i} ", token(text, "bold")),
                [
                    Shade(cosine, f"{i} {visible(text)} and {j} {visible(texts[j])}: {signed(cosine)}")
                    for j, cosine in enumerate(row)
                ],
                Text(),
            )
            for i, (text, row) in enumerate(zip(texts, found.cosines.tolist(), strict=True))
        ],
        "Full colour: the same map but for a factor. Empty rows: tokens whose map is zero, as behind the position.",
    )
