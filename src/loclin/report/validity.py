"""What is said of the frozen map away from its prompt: mean curves, and every swap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.text import Text

from loclin.analyses.validity import PREDICTORS, Step, Validity
from loclin.report import run
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, POSITIVE, curve, draw
from loclin.report.sheet import PAGE, Chip, Figure, Folded, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import error, percent, shortened, token

KINDS = {
    "noise": ("Random directions", "every token moved at once; the size is a share of each token's own length"),
    "near": ("Towards near tokens", "one token moved towards one of its nearest neighbours; 1: it has become it"),
    "random": ("Towards random tokens", "one token moved towards any other; 1: it has become it"),
}
NAMES = {"frozen": "frozen map J x′ + b", "ordinary": "ordinary Jacobian (Taylor)", "constant": "no change"}
_COLOURS = dict(zip(PREDICTORS, (POSITIVE, NEGATIVE, NEUTRAL), strict=True))
_FIGURES = {
    "final": "error of the final hidden state, |predicted − true| / |true|",
    "kl": "divergence of the predicted probabilities, in nats",
}
_HEADS = [f"{predictor} {what}" for what in ("error", "KL", "same") for predictor in PREDICTORS]
_SWAPS = 200


@describe.register
def describe_validity(found: Validity, _limits: Limits = PAGE) -> Sheet:
    """Say how far from its prompt the frozen map predicts the model."""
    title, known = shortened(run.prompt(found)), run.run_of(found)
    assert known is not None
    curves = {kind: found.curve(kind) for kind in KINDS}
    swaps = [ray for ray in found.rays if ray.position is not None]
    note = "error: |predicted − true| / |true| of the final hidden state; same: names the same likeliest token"
    return Sheet(
        title=title,
        about="how far from its prompt an exact linear map still predicts the model",
        chips=[Chip(text) for text in run.tokens(found)],
        sections=[_section(found, kind, curve) for kind, curve in curves.items() if curve]
        + ([_swaps(found, len(swaps))] if swaps else []),
        notes=[note, f"gate {known.options['gate']}: another gate is another map"],
        warnings=found.warnings,
        run=known,
    )


def _section(found: Validity, kind: str, curve: Sequence[Step]) -> Section:
    name, note = KINDS[kind]
    table = Table.of(Column("size", "key"), *map(Column, _HEADS))
    for step in curve:
        table.add(f"{step.size:g}", *_numbers(step))
    figures = [
        Figure(f"{kind}-{measure}", f"{name}: {label}", partial(_figure, curve, measure))
        for measure, label in _FIGURES.items()
    ]
    count = sum(ray.kind == kind for ray in found.rays)
    return Section(name, f"{note}; means over {count} moves", [*figures, table])


def _numbers(step: Step) -> list[str]:
    found = [step.errors[predictor] for predictor in PREDICTORS]
    return [
        *(error(one.final) for one in found),
        *(error(one.kl) for one in found),
        *(percent(one.top) for one in found),
    ]


def _swaps(found: Validity, count: int) -> Section:
    """What is predicted once a token has become another one, for pages."""
    table = Table.of(Column("token", "key"), Column("becomes", "words"), Column("", "parts"), *map(Column, _HEADS))
    texts = run.tokens(found)
    for ray in [ray for ray in found.rays if ray.position is not None][:_SWAPS]:
        assert ray.position is not None
        table.add(token(texts[ray.position]), token(ray.token or ""), ray.kind, *_numbers(ray.steps[-1]))
    cut = f" Of {count}, the first {_SWAPS}." if count > _SWAPS else ""
    return Section(
        "Every swap",
        f"What is predicted once the token has become the other one.{cut}",
        [Folded(Text(f"{len(table.rows)} swaps"), [table])],
    )


def _figure(steps: Sequence[Step], measure: str) -> dict[str, Any]:
    """Draw how well each predictor does with the size of the move."""
    traces = []
    for predictor in PREDICTORS:
        values = [getattr(step.errors[predictor], measure) for step in steps]
        traces.append(
            curve(
                [step.size for step in steps],
                [value if value > 0 else None for value in values],  # a logarithm has no place for zero
                NAMES[predictor],
                _COLOURS[predictor],
                line={"dash": "dot" if predictor == "constant" else "solid"},
                hovertemplate="size %{x:.3g}: %{y:.3g}<extra>%{fullData.name}</extra>",
            )
        )
    return draw(
        traces,
        x="size of the move",
        y=_FIGURES[measure].partition(",")[0],
        legend=ABOVE,
        margin_t=64,
        xaxis_type="log",
        yaxis={"type": "log", "exponentformat": "power"},
    )
