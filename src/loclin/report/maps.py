"""What maps show: their ends, how exact they are, their singular values, and how alike they are."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.similarity import Similarity
from loclin.maps.certificate import Certificate
from loclin.maps.layer_spectra import LayerSpectra
from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized
from loclin.report import run
from loclin.report.sheet import PAGE, Chip, Heat, Limits, Section, Shade, Sheet, describe, left_out, sheet_of
from loclin.report.table import COUNTER, Column, Table
from loclin.report.text import (
    COMPONENTS,
    certified,
    error,
    number,
    outcome,
    percent,
    plain,
    predicted,
    signed,
    token,
    visible,
)
from loclin.results.compare import Comparison
from loclin.spectral import SVD

_VALUES = 8
"""How many singular values a row has."""
_MOST = 64
"""Tokens of a prompt up to which there is a coloured cell for each pair."""


@describe.register
def _describe_linearized(lin: Linearized, _limits: Limits = PAGE) -> Sheet:
    """Show the prompt, and what the model predicts after it; nothing is computed for it."""
    words = lin.next_tokens(5)
    cells = ((token(text), percent(probability)) for text, probability in words)
    return sheet_of(
        lin.jacobian(),
        "a model, at one prompt, as an exact linear map",
        [Section("Predictions", "", [Table.of(Column("next token", "key"), "probability", rows=cells)])],
        kind="linearized",
        chips=[Chip(text, marks=["sink"] * (i in lin.sinks)) for i, text in enumerate(lin.tokens)],
        lead=[predicted(words[0])],
        warnings=lin.warnings,
    )


@describe.register
def _describe_map(J: LinearMap, _limits: Limits = PAGE) -> Sheet:
    """Show the ends and the shape of a map; nothing is computed for it."""
    known, (d_out, length, d_in) = J.provenance(), J.shape
    facts = (
        ("source", f"{J.source}, {length} tokens"),
        ("target", f"{J.target}{', with the final norm on top' * J.normed}, at position {J.position}"),
        ("shape", f"[{d_out}, {length}, {d_in}]  (d_out, T, d_in)"),
        ("dense map", "computed" if J.cached_dense is not None else "not computed"),
    )
    section = Section("y = Σ J_i x_i + b", "", [Table.of(COUNTER, Column("", "words"), rows=facts)])
    title = f"map: {known.source} → {known.target}"
    return sheet_of(J, "an exact linear map of a model at one prompt", [section], title=title)


def check_table(certificate: Certificate, ordinary: float | None = None) -> Table:
    """Give a row to each error of a certificate, first those that decide whether the map is exact."""
    table = Table.of(
        Column("check", "key"), "error", "at most", Column("", "parts"), Column("of", "words"),
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
def _describe_certificate(certificate: Certificate, _limits: Limits = PAGE) -> Sheet:
    section = Section("Errors", "relative, without a unit", [check_table(certificate)])
    return sheet_of(certificate, "is the map exact?", [section], kind="certificate", lead=[certified(certificate)])


@describe.register
def _describe_comparison(found: Comparison, _limits: Limits = PAGE) -> Sheet:
    numbers = ((name, "bit-identical" if off == 0 else error(off)) for name, off in found.errors.items())
    origins = [(name, plain(str(a)), plain(str(b))) for name, (a, b) in found.differences.items()]
    differences = Table.of(Column("of", "key"), Column("a", "words"), Column("b", "words"), rows=origins)
    same = Text("the same model, prompt and options", "dim")
    return Sheet(
        title=f"two of {found.kind}",
        about="how two results differ",
        sections=[
            Section("Numbers", "relative differences", [Table.of(Column("of", "key"), "|a − b| / |b|", rows=numbers)]),
            Section("Origins", "what is not the same", [differences if origins else same]),
        ],
    )


@describe.register
def _describe_svd(svd: SVD, limits: Limits = PAGE) -> Sheet:
    joint, known = svd.S.dim() == 1, svd.provenance
    values, norms = svd.S[None] if joint else svd.S, svd.frobenius.reshape(-1).tolist()
    off = svd.relative_error.reshape(values.shape).amax(1).tolist()
    places = [] if known is None else [(str(i), token(known.tokens[i], "bold")) for i in known.positions]
    table = Table.of(COUNTER, Column("token", "key"), *_values(values.shape[1]), "largest error", "‖J‖F")
    for i, row in list(enumerate(values.tolist()))[: limits.tokens]:
        place = places[i] if i < len(places) else (str(i), Text())
        place = ("", Text("all", "italic")) if joint else place
        table.add(*place, *map(number, row[:_VALUES]), error(off[i]), number(norms[i]))
    sure = (
        f"errors are bounds that fail with probability {svd.failure:.1g}" if svd.failure < 1 else "errors are estimates"
    )
    of = "all tokens' maps side by side" if joint else "each token's map"
    return sheet_of(
        svd,
        "the singular values of an exact linear map",
        [Section("Singular values", f"of {of}", [table])],
        kind="singular values",
        notes=[f"{sure}; method {svd.method}, {svd.columns} columns"],
    )


@describe.register
def _describe_spectra(found: LayerSpectra, _limits: Limits = PAGE) -> Sheet:
    of = "of all tokens' maps side by side"
    ranks, values = found.joint_stable_rank, found.joint_S
    if ranks is None or values is None:
        of = "the largest of any token's map, and the tokens' mean stable rank"
        ranks, values = found.stable_rank.mean(-1), found.S.amax(2)
    sections = []
    for c, name in enumerate(found.components):
        table = Table.of(Column("layer", "key"), *_values(values.shape[-1]), "stable rank", "|Jx + b − y| / |y|")
        for layer in range(found.n_layers):
            largest, rank = map(number, values[c, layer].tolist()[:_VALUES]), ranks[c, layer].item()
            table.add(str(layer), *largest, f"{rank:.2f}", error(found.reconstruction_error[c, layer].item()))
        sections.append(Section(COMPONENTS.get(name, name), f"{found.mode}: {of}", [table]))
    return sheet_of(
        found,
        "the singular values of every layer's maps",
        sections,
        kind="layer spectra",
        notes=[f"values to {found.tolerance:g}; {found.direction} sweeps, {found.columns:,} columns"],
    )


def _values(count: int) -> list[str]:
    return [f"σ{i + 1}" for i in range(min(count, _VALUES))]


@describe.register
def _describe_similarity(found: Similarity, limits: Limits = PAGE) -> Sheet:
    rows = sorted(zip(*found.table().values(), strict=True), key=lambda row: -row[-1])
    pairs = Table.of(
        *(COUNTER, Column("token", "key"), "", Column("other", "words"), "cosine"),
        rows=(
            (str(i), token(text, "bold"), str(j), token(other, "bold"), signed(cosine))
            for i, text, j, other, cosine in rows[: limits.parts]
        ),
    )
    note = "the cosine of their maps, the most alike first"
    sections = [Section("Pairs of tokens", note, [pairs, *left_out(len(rows) - limits.parts)])]
    texts = run.tokens(found)
    if len(texts) <= _MOST:
        sections.append(Section("All pairs", "", [_matrix(found, texts)]))
    return sheet_of(found, "how alike the tokens' exact maps are, at this prompt", sections, kind="similarity")


def _matrix(found: Similarity, texts: list[str]) -> Heat:
    rows = []
    for i, (text, row) in enumerate(zip(texts, found.cosines.tolist(), strict=True)):
        cells = [
            Shade(cosine, f"{i} {visible(text)} and {j} {visible(texts[j])}: {signed(cosine)}")
            for j, cosine in enumerate(row)
        ]
        rows.append((Text.assemble(f"{i} ", token(text, "bold")), cells, Text()))
    note = "Full colour: the same map but for a factor. Empty rows: tokens whose map is zero, as behind the position."
    return Heat([(token(text), 1) for text in texts], rows, note)
