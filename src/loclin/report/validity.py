"""What is said of the frozen map away from its prompt: mean curves, and every swap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.text import Text

from loclin.analyses.validity import PREDICTORS, Step, Validity
from loclin.report import run
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, POSITIVE, curve, draw
from loclin.report.sheet import PAGE, Figure, Folded, Limits, Section, Sheet, describe, sheet_of
from loclin.report.table import Column, Table
from loclin.report.text import error, percent, token

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
def _describe_validity(found: Validity, _limits: Limits = PAGE) -> Sheet:
    note = "error: |predicted − true| / |true| of the final hidden state; same: names the same likeliest token"
    return sheet_of(
        found,
        "how far from its prompt an exact linear map still predicts the model",
        [*(_section(found, kind, curve) for kind in KINDS if (curve := found.curve(kind))), *_swaps(found)],
        notes=[note, f"gate {run.run_of(found).options['gate']}: another gate is another map"],
    )


def _section(found: Validity, kind: str, curve: Sequence[Step]) -> Section:
    name, note = KINDS[kind]
    rows = ((f"{step.size:g}", *_numbers(step)) for step in curve)
    table = Table.of(Column("size", "key"), *_HEADS, rows=rows)
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


def _swaps(found: Validity) -> list[Section]:
    """What is predicted once a token has become another one, for pages."""
    table = Table.of(Column("token", "key"), Column("becomes", "words"), Column("", "parts"), *_HEADS)
    swaps = [(ray, ray.position) for ray in found.rays if ray.position is not None]
    for ray, position in swaps[:_SWAPS]:
        text = token(run.tokens(found)[position])
        table.add(text, token(ray.token or ""), ray.kind, *_numbers(ray.steps[-1]))
    cut = f" Of {len(swaps)}, the first {_SWAPS}." if len(swaps) > _SWAPS else ""
    note = f"What is predicted once the token has become the other one.{cut}"
    folded = Folded(Text(f"{len(table.rows)} swaps"), [table])
    return [Section("Every swap", note, [folded])] if swaps else []


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
