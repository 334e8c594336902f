"""What a linearized prompt and a map show of themselves in a notebook; nothing is computed for it."""

from __future__ import annotations

from rich.text import Text

from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized
from loclin.report import run
from loclin.report.sheet import PAGE, Chip, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import percent, predicted, shortened, token


@describe.register
def describe_linearized(lin: Linearized, _limits: Limits = PAGE) -> Sheet:
    """Show the prompt, and what the model predicts after it."""
    words = lin.next_tokens(5)
    table = Table.of(Column("next token", "key"), Column("probability"))
    for text, probability in words:
        table.add(token(text), percent(probability))
    return Sheet(
        title=f"linearized: {shortened(lin.text)}",
        about="a model, at one prompt, as an exact linear map",
        chips=[Chip(text, marks=["sink"] if i in lin.sinks else []) for i, text in enumerate(lin.tokens)],
        lead=[predicted(words[0])],
        sections=[Section("Predictions", "", [table])],
        warnings=lin.warnings,
        run=run.run_at(lin.jacobian().provenance()),
    )


@describe.register
def describe_map(J: LinearMap, _limits: Limits = PAGE) -> Sheet:
    """Show the ends and the shape of a map."""
    known, (d_out, length, d_in) = J.provenance(), J.shape
    facts = Table.of(Column("", "key"), Column("", "words"))
    for name, value in (
        ("source", f"{J.source}, {length} tokens"),
        ("target", f"{J.target}{', with the final norm on top' * J.normed}, at position {J.position}"),
        ("shape", f"[{d_out}, {length}, {d_in}]  (d_out, T, d_in)"),
        ("dense map", "computed" if J.cached_dense is not None else "not computed"),
    ):
        facts.add(name, Text(value))
    return Sheet(
        title=f"map: {known.source} → {known.target}",
        about="an exact linear map of a model at one prompt",
        chips=[Chip(text) for text in known.tokens],
        sections=[Section("y = Σ J_i x_i + b", "", [facts])],
        warnings=J.warnings,
        run=run.run_at(known),
    )
