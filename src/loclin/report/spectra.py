"""What is said of singular values."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from loclin.maps.layer_spectra import LayerSpectra
from loclin.report import run
from loclin.report.sheet import PAGE, Chip, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import COMPONENTS, error, number, shortened, token
from loclin.results.provenance import Provenance
from loclin.spectral import SVD

_VALUES = 8
"""How many singular values a row has."""


@describe.register
def describe_svd(svd: SVD, limits: Limits = PAGE) -> Sheet:
    """Say the singular values of each token's map, and how sure they are."""
    joint, texts = svd.S.dim() == 1, _texts(svd.provenance)
    values, norms = svd.S[None] if joint else svd.S, svd.frobenius.reshape(-1).tolist()
    off = svd.relative_error.reshape(values.shape).amax(1)
    heads = [*_values(values.shape[1]), Column("largest error"), Column("‖J‖F")]
    table = Table.of(Column("", "key"), Column("token", "key"), *heads)
    for i, row in list(enumerate(values.tolist()))[: limits.tokens]:
        place, name = ("", Text("all", "italic")) if joint else _place(texts, i)
        table.add(place, name, *map(number, row[:_VALUES]), error(off[i].item()), number(norms[i]))
    sure = (
        f"errors are bounds that fail with probability {svd.failure:.1g}" if svd.failure < 1 else "errors are estimates"
    )
    of = "all tokens' maps side by side" if joint else "each token's map"
    return Sheet(
        title=f"singular values: {shortened(run.prompt(svd))}",
        about="the singular values of an exact linear map",
        chips=[Chip(text) for text in run.tokens(svd)],
        sections=[Section("Singular values", f"of {of}", [table])],
        notes=[f"{sure}; method {svd.method}, {svd.columns} columns"],
        warnings=svd.warnings,
        run=run.run_of(svd),
    )


@describe.register
def describe_spectra(found: LayerSpectra, _limits: Limits = PAGE) -> Sheet:
    """Say the singular values of all tokens' maps together, layer by layer."""
    sections = []
    for c, name in enumerate(found.components):
        heads = [*_values(found.S.shape[-1]), Column("stable rank"), Column("|Jx + b − y| / |y|")]
        table = Table.of(Column("layer", "key"), *heads)
        for layer in range(found.n_layers):
            rank, values = found.stable_rank[c, layer].mean(), found.S[c, layer].amax(0)
            if found.joint_S is not None and found.joint_stable_rank is not None:
                rank, values = found.joint_stable_rank[c, layer], found.joint_S[c, layer]
            off = found.reconstruction_error[c, layer].item()
            table.add(str(layer), *map(number, values.tolist()[:_VALUES]), f"{rank.item():.2f}", error(off))
        sections.append(Section(COMPONENTS.get(name, name), _of(found), [table]))
    return Sheet(
        title=f"layer spectra: {shortened(run.prompt(found))}",
        about="the singular values of every layer's maps",
        chips=[Chip(text) for text in run.tokens(found)],
        sections=sections,
        notes=[f"values to {found.tolerance:g}; {found.direction} sweeps, {found.columns:,} columns"],
        warnings=found.warnings,
        run=run.run_of(found),
    )


def _of(found: LayerSpectra) -> str:
    if found.joint_S is None:
        return f"{found.mode}: the largest of any token's map, and the tokens' mean stable rank"
    return f"{found.mode}: of all tokens' maps side by side"


def _texts(known: Provenance | None) -> list[tuple[int, str]]:
    return [] if known is None else [(i, known.tokens[i]) for i in known.positions]


def _place(texts: Sequence[tuple[int, str]], i: int) -> tuple[str, Text]:
    return (str(texts[i][0]), token(texts[i][1], "bold")) if i < len(texts) else (str(i), Text())


def _values(count: int) -> list[Column]:
    return [Column(f"σ{i + 1}") for i in range(min(count, _VALUES))]
