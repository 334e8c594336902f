"""The plotly figures of an explanation; colours that depend on light or dark are left to the page."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.report.choose import largest
from loclin.report.plot import NEGATIVE, NEUTRAL, PALETTE, POSITIVE, graph_objects, plain
from loclin.report.text import error, number, signed, visible

FULL_SPECTRA = 64
SPECTRUM_POINTS = 40_000
"""Points of all spectra together; beyond them every spectrum is thinned."""
CURVES = 6
"""Spectra shown at first; the others wait in the legend."""
SCATTER_POINTS = 4096
NAMED_TICKS = 48
"""Beyond this many tokens an axis counts them and their names are left to hovering."""


def figures(explanation: Explanation) -> dict[str, Any]:
    """Draw the figures, by the name of the place they go to.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    go = graph_objects()
    drawn = {
        "shares": _shares(explanation, go),
        "scatter": _scatter(explanation, go),
        "spectra": _spectra(explanation, go),
    }
    for figure in drawn.values():
        figure.update_layout(**plain())
    return drawn


def label(token: TokenExplanation) -> str:
    """Name a token in a figure, where plotly reads a few HTML tags, %{templates} and $formulas$."""
    return html.escape(visible(token.text, 24)).replace("%", "&#37;").replace("$", "&#36;")


def _shares(explanation: Explanation, go: Any) -> Any:
    """Draw what is shared out as bars: a bar for each token, the last one for the biases."""
    tokens = explanation.tokens
    shares = [token.share for token in tokens] + [explanation.bias_share]
    names = [label(token) for token in tokens] + ["bias"]
    notes = [f"<b>{label(t)}</b>{' (sink)' if t.is_sink else ''}<br>{_numbers(t)}" for t in tokens]
    notes.append(f"<b>bias</b><br>share {signed(explanation.bias_share)}")
    figure = go.Figure(
        go.Bar(
            x=list(range(len(shares))),
            y=np.array(shares, dtype=np.float32),
            marker={
                "color": [POSITIVE if share >= 0 else NEGATIVE for share in shares[:-1]] + [NEUTRAL],
                "pattern": {
                    "shape": ["/" if token.is_sink else "" for token in tokens] + [""],
                    "solidity": 0.25,
                },
            },
            hovertext=notes,
            hoverinfo="text",
        )
    )
    named = len(names) <= NAMED_TICKS
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names} if named else {}
    figure.update_layout(
        showlegend=False,
        bargap=0.25 if named else 0.05,
        margin={"l": 60, "r": 12, "t": 12, "b": 56 if named else 48},
    )
    figure.update_xaxes(title=None if named else "token", showgrid=False, automargin=True, **ticks)
    figure.update_yaxes(title=f"share of the {explanation.target['kind']}", zeroline=True)
    return figure


def _numbers(token: TokenExplanation) -> str:
    return (
        f"share {signed(token.share)}<br>Frobenius norm {number(token.frobenius_norm)}"
        f"<br>stable rank {number(token.stable_rank)}"
    )


def _scatter(explanation: Explanation, go: Any) -> Any:
    """Draw both reconstructions against the output (paper, Figure 3)."""
    y = np.array(explanation.output, dtype=np.float32)
    step = _thinned(len(y), SCATTER_POINTS)
    order = np.argsort(y)[step]  # thinned along the sorted output, so that the extremes stay
    low, high = float(y.min()), float(y.max())
    figure = go.Figure(
        go.Scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            line={"color": NEUTRAL, "width": 1, "dash": "dot"},
            name="exact",
            hoverinfo="skip",
        )
    )
    for name, values, problem, colour, symbol in (
        ("ordinary Jacobian", explanation.ordinary, explanation.ordinary_error, NEGATIVE, "diamond-open"),
        (
            "frozen map Jx + b",
            explanation.reconstruction,
            explanation.certificate.std_error,
            POSITIVE,
            "circle",
        ),
    ):
        figure.add_trace(
            go.Scatter(
                x=y[order],
                y=np.array(values, dtype=np.float32)[order],
                mode="markers",
                name=f"{name}: error {error(problem)}",
                marker={"color": colour, "size": 5, "symbol": symbol, "opacity": 0.75},
                customdata=order.astype(np.int32),
                hovertemplate="unit %{customdata}<br>model %{x:.5g}<br>rebuilt %{y:.5g}<extra></extra>",
            )
        )
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 12, "t": 64, "b": 48},
    )
    figure.update_xaxes(title="the model's output, each unit")
    figure.update_yaxes(title="rebuilt")
    return figure


def _spectra(explanation: Explanation, go: Any) -> Any:
    """Draw each token's singular values over its largest; a zero map has none."""
    tokens = explanation.tokens
    first = largest(tokens, CURVES)
    figure = go.Figure()
    for i, token in enumerate(tokens):
        values = np.array(token.singular_values, dtype=np.float64)
        if not len(values) or not values[0] > 0:
            continue
        values = values[values > 0]  # a logarithm has no place for zero
        kept = _thinned(len(values), spectrum_points(explanation))
        figure.add_trace(
            go.Scatter(
                x=(kept + 1).astype(np.int32),
                y=(values[kept] / values[0]).astype(np.float32),
                mode="lines" if len(kept) > 1 else "markers",
                name=f"{i} {label(token)}",
                meta=i,
                line={"color": PALETTE[i % len(PALETTE)], "width": 1.5},
                visible=True if i in first else "legendonly",
                hovertemplate="%{fullData.name}<br>σ%{x} = %{y:.3g} σ1<extra></extra>",
            )
        )
    figure.update_layout(showlegend=True, legend={"maxheight": 0.9}, margin={"l": 76, "r": 12, "t": 36, "b": 48})
    figure.update_xaxes(title="singular value, the largest first")
    figure.update_yaxes(title="σ / σ1", type="log", exponentformat="power", dtick=1 if _few_decades(tokens) else None)
    return figure


def _few_decades(tokens: list[TokenExplanation]) -> bool:
    """Whether all spectra together span few enough decades to name each one."""
    positive = [v / t.singular_values[0] for t in tokens for v in t.singular_values if v > 0]
    return bool(positive) and min(positive) > 1e-10


def spectrum_points(explanation: Explanation) -> int:
    """Count the points that each spectrum may have: all of them up to `FULL_SPECTRA` tokens, fewer beyond."""
    length = max(len(token.singular_values) for token in explanation.tokens)
    return (
        length if len(explanation.tokens) <= FULL_SPECTRA else min(length, SPECTRUM_POINTS // len(explanation.tokens))
    )


def _thinned(length: int, most: int) -> Any:
    """Choose about `most` of `length` places: half of them evenly, half ever further apart."""
    if length <= most:
        return np.arange(length)
    even = np.linspace(0, length - 1, most // 2)
    wider = np.geomspace(1, length, most - most // 2) - 1
    return np.unique(np.concatenate([even, wider]).round().astype(np.int64))
