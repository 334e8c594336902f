"""What certificates and comparisons say."""

from __future__ import annotations

from rich.text import Text

from loclin.maps.certificate import Certificate
from loclin.report.run import prompt, run_of, tokens
from loclin.report.sheet import PAGE, Chip, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import certified, error, outcome, plain, shortened
from loclin.results.compare import Comparison


def check_table(certificate: Certificate, ordinary: float | None = None) -> Table:
    """Give a row to each error of a certificate, first those that decide whether the map is exact."""
    table = Table.of(
        Column("check", "key"), Column("error"), Column("at most"), Column("", "parts"), Column("of", "words"),
        Column("meaning", "words"),
    )  # fmt: skip
    for check in certificate.checks():
        passed = Text("✓ passed", "green") if check.passed else Text("✗ failed", "red")
        cells = (outcome(check), error(check.limit), passed, check.formula, check.meaning)
        table.add(Text(check.name, "bold"), *cells)
    more = [
        ("std error", certificate.std_error, "std(Jx + b − y) / std(y)", "The paper's metric for the frozen map."),
        ("ordinary Jacobian", ordinary, "the same", "What it is when nothing is frozen."),
        ("bias share", certificate.bias_share, "|b| / |y|", "How much of the output comes from biases."),
    ]
    for name, value, formula, meaning in more:
        if value is not None:
            table.add(name, error(value), "", "", formula, meaning)
    return table


@describe.register
def describe_certificate(certificate: Certificate, _limits: Limits = PAGE) -> Sheet:
    """Say how exact a map is."""
    return Sheet(
        title=f"certificate: {shortened(prompt(certificate))}",
        about="is the map exact?",
        chips=[Chip(text) for text in tokens(certificate)],
        lead=[certified(certificate)],
        sections=[Section("Errors", "relative, without a unit", [check_table(certificate)])],
        warnings=certificate.warnings,
        run=run_of(certificate),
    )


@describe.register
def describe_comparison(found: Comparison, _limits: Limits = PAGE) -> Sheet:
    """Say how two results differ."""
    numbers = Table.of(Column("of", "key"), Column("|a − b| / |b|"))
    for name, off in found.errors.items():
        numbers.add(name, "bit-identical" if off == 0 else error(off))
    origins = Table.of(Column("of", "key"), Column("a", "words"), Column("b", "words"))
    for name, (a, b) in found.differences.items():
        origins.add(name, plain(str(a)), plain(str(b)))
    same = Text("the same model, prompt and options", "dim")
    return Sheet(
        title=f"two of {found.kind}",
        about="how two results differ",
        sections=[
            Section("Numbers", "relative differences", [numbers]),
            Section("Origins", "what is not the same", [origins if origins.rows else same]),
        ],
    )
