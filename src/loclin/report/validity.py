"""The frozen map away from its prompt: on a terminal, and as a page with curves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from loclin.analyses.validity import PREDICTORS, Ray, Step, Validity
from loclin.report import html as parts
from loclin.report.explanation.tables import token_text
from loclin.report.grid import Column, Grid, show
from loclin.report.plot import NEGATIVE, NEUTRAL, POSITIVE, graph_objects, plotly_script
from loclin.report.sheet import embedded, facts, section, sheet, shortened
from loclin.report.terminal import warning
from loclin.report.text import error, percent
from loclin.results.files import write_text

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
_SWAPS = 200


def render_validity(validity: Validity, console: Console) -> None:
    """Print the mean curves: a table for each way of moving the input."""
    printed: list[RenderableType] = [Text(" ").join(token_text(text, "bold") for text in validity.tokens)]
    for kind, (name, note) in KINDS.items():
        curve = validity.curve(kind)
        if not curve:
            continue
        table = Grid.of(
            Column("size", "key"), *(Column(head) for head in [*(f"{p} error" for p in PREDICTORS), *_more()])
        )
        for step in curve:
            table.add(*_numbers(step))
        printed += [Text(), Text.assemble((name, "bold"), (f"  {note}", "dim")), table]
    note = "error: |predicted − true| / |true| of the final hidden state; same: names the same likeliest token"
    gate = f"gate {validity.settings.get('gate')}: another gate is another map"
    show(
        console, *printed, Text(), Text(note, "dim"), Text(gate, "dim"), *(warning(text) for text in validity.warnings)
    )


def _more() -> list[str]:
    return [f"{predictor} {what}" for what in ("KL", "same") for predictor in PREDICTORS]


def _numbers(step: Step) -> list[str]:
    found = [step.errors[predictor] for predictor in PREDICTORS]
    return [
        f"{step.size:g}",
        *(error(one.final) for one in found),
        *(error(one.kl) for one in found),
        *(percent(one.top) for one in found),
    ]


def validity_html(validity: Validity) -> str:
    """Write the curves and the swaps as a self-contained page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    curves = {kind: validity.curve(kind) for kind in KINDS}
    drawn = {
        f"{kind}-{measure}": json.loads(_figure(curve, measure).to_json())
        for kind, curve in curves.items()
        for measure in _FIGURES
        if curve
    }
    body = "".join(
        section(
            KINDS[kind][0],
            f"Size: {KINDS[kind][1]}. Means over {sum(ray.kind == kind for ray in validity.rays)} moves.",
            f'<div class="pair">{_places(kind)}</div>{_table(curve)}',
        )
        for kind, curve in curves.items()
        if curve
    )
    swaps = [ray for ray in validity.rays if ray.position is not None]
    if swaps:
        note = "What is predicted once the token has become the other one." + _cut(len(swaps))
        body += section("Every swap", note, _swap_table(validity, swaps[:_SWAPS]))
    title = shortened(validity.prompt)
    chips = "".join(f'<span class="chip" style="--a:0">{parts.token(text)}</span>' for text in validity.tokens)
    return sheet(
        title=title,
        about="how far from its prompt an exact linear map still predicts the model",
        heading=parts.token(title),
        lead=f'<div class="chips">{chips}</div>{parts.warnings(validity)}',
        body=body,
        settings=facts(validity.model, validity.settings),
        scripts=f'<script type="application/json" id="data">{embedded(drawn)}</script>'
        f"<script>{plotly_script()}</script><script>{_SCRIPT}</script>",
    )


def write_validity(validity: Validity, path: str | os.PathLike[str]) -> None:
    """Write the page to a file, whole or not at all.

    Raises
    ------
    OutputError
        When plotly is not installed or the file cannot be written.
    """
    write_text(path, validity_html(validity))


_SCRIPT = """
for (const [id, figure] of Object.entries(JSON.parse(document.getElementById("data").textContent))) {
  const style = getComputedStyle(document.body);
  figure.layout.font = {color: style.color, family: style.fontFamily};
  Plotly.newPlot(id, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""


def _places(kind: str) -> str:
    return "".join(
        f'<div class="figure" id="{kind}-{measure}" role="img" aria-label="{label}"></div>'
        for measure, label in _FIGURES.items()
    )


def _figure(curve: Sequence[Step], measure: str) -> Any:
    go = graph_objects()

    figure = go.Figure()
    for predictor in PREDICTORS:
        values = [getattr(step.errors[predictor], measure) for step in curve]
        figure.add_trace(
            go.Scatter(
                x=[step.size for step in curve],
                y=[value if value > 0 else None for value in values],  # a logarithm has no place for zero
                mode="lines+markers",
                name=NAMES[predictor],
                line={"color": _COLOURS[predictor], "dash": "dot" if predictor == "constant" else "solid"},
                hovertemplate="size %{x:.3g}: %{y:.3g}<extra>%{fullData.name}</extra>",
            )
        )
    clear, grid = "rgba(0,0,0,0)", "rgba(139,147,161,.3)"
    figure.update_layout(
        template="none",
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 76, "r": 12, "t": 64, "b": 48},
    )
    figure.update_xaxes(title="size of the move", type="log", gridcolor=grid)
    figure.update_yaxes(title=_FIGURES[measure].partition(",")[0], type="log", gridcolor=grid, exponentformat="power")
    return figure


def _table(curve: Sequence[Step]) -> str:
    heads = ["size", *(f"{predictor}: error" for predictor in PREDICTORS), *_more()]
    return _html_table(heads, [_numbers(step) for step in curve])


def _swap_table(validity: Validity, rays: Sequence[Ray]) -> str:
    heads = ["token", "becomes", "", *(f"{predictor}: error" for predictor in PREDICTORS), *_more()]
    rows = []
    for ray in rays:
        assert ray.position is not None
        before, after = validity.tokens[ray.position], ray.token or ""
        words = [f'<span class="word">{parts.token(text, 24)}</span>' for text in (before, after)]
        rows.append([*words, ray.kind, *_numbers(ray.steps[-1])[1:]])
    return f'<div class="scroll tall">{_html_table(heads, rows)}</div>'


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region"><table class="grid-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cut(count: int) -> str:
    return f" Of {count}, the first {_SWAPS}." if count > _SWAPS else ""
