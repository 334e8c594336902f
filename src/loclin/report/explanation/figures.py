"""The plotly figures of an explanation; colours that depend on light or dark are left to the page."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from loclin.analyses.explain import Explanation, TokenExplanation
from loclin.report.explanation.sheet import largest
from loclin.report.plot import ABOVE, NEGATIVE, NEUTRAL, PALETTE, POSITIVE, curve, draw
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
    return {"shares": _shares(explanation), "scatter": _scatter(explanation), "spectra": _spectra(explanation)}


def label(token: TokenExplanation) -> str:
    """Name a token in a figure, where plotly reads a few HTML tags, %{templates} and $formulas$."""
    return html.escape(visible(token.text, 24)).replace("%", "&#37;").replace("$", "&#36;")


def _shares(explanation: Explanation) -> dict[str, Any]:
    """Draw what is shared out as bars: a bar for each token, the last one for the biases."""
    tokens = explanation.tokens
    shares = [token.share for token in tokens] + [explanation.bias_share]
    names = [label(token) for token in tokens] + ["bias"]
    notes = [f"<b>{label(t)}</b>{' (sink)' * t.is_sink}<br>{_numbers(t)}" for t in tokens]
    notes.append(f"<b>bias</b><br>share {signed(explanation.bias_share)}")
    named = len(names) <= NAMED_TICKS
    bars = {
        "type": "bar",
        "x": list(range(len(shares))),
        "y": np.array(shares, dtype=np.float32),
        "marker": {
            "color": [POSITIVE if share >= 0 else NEGATIVE for share in shares[:-1]] + [NEUTRAL],
            "pattern": {"shape": ["/" * token.is_sink for token in tokens] + [""], "solidity": 0.25},
        },
        "hovertext": notes,
        "hoverinfo": "text",
    }
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names} if named else {}
    return draw(
        [bars],
        x=None if named else "token",
        y=f"share of the {explanation.target['kind']}",
        bargap=0.25 if named else 0.05,
        xaxis={"showgrid": False, "automargin": True} | ticks,
        yaxis_zeroline=True,
    )


def _numbers(token: TokenExplanation) -> str:
    return (
        f"share {signed(token.share)}<br>Frobenius norm {number(token.frobenius_norm)}"
        f"<br>stable rank {number(token.stable_rank)}"
    )


def _scatter(explanation: Explanation) -> dict[str, Any]:
    """Draw both reconstructions against the output (paper, Figure 3)."""
    y = np.array(explanation.output, dtype=np.float32)
    step = _thinned(len(y), SCATTER_POINTS)
    order = np.argsort(y)[step]  # thinned along the sorted output, so that the extremes stay
    ends = [float(y.min()), float(y.max())]
    traces = [
        curve(ends, ends, "exact", NEUTRAL, mode="lines", line={"width": 1, "dash": "dot"}, hoverinfo="skip"),
    ]
    for name, values, problem, colour, symbol in (
        ("ordinary Jacobian", explanation.ordinary, explanation.ordinary_error, NEGATIVE, "diamond-open"),
        ("frozen map Jx + b", explanation.reconstruction, explanation.certificate.std_error, POSITIVE, "circle"),
    ):
        traces.append(
            {
                "type": "scatter",
                "x": y[order],
                "y": np.array(values, dtype=np.float32)[order],
                "mode": "markers",
                "name": f"{name}: error {error(problem)}",
                "marker": {"color": colour, "size": 5, "symbol": symbol, "opacity": 0.75},
                "customdata": order.astype(np.int32),
                "hovertemplate": "unit %{customdata}<br>model %{x:.5g}<br>rebuilt %{y:.5g}<extra></extra>",
            }
        )
    return draw(traces, x="the model's output, each unit", y="rebuilt", legend=ABOVE, margin_t=64)


def _spectra(explanation: Explanation) -> dict[str, Any]:
    """Draw each token's singular values over its largest; a zero map has none."""
    tokens, traces = explanation.tokens, []
    first = largest(tokens, CURVES)
    for i, token in enumerate(tokens):
        values = np.array(token.singular_values, dtype=np.float64)
        if not len(values) or not values[0] > 0:
            continue
        values = values[values > 0]  # a logarithm has no place for zero
        kept = _thinned(len(values), spectrum_points(explanation))
        traces.append(
            {
                "type": "scatter",
                "x": (kept + 1).astype(np.int32),
                "y": (values[kept] / values[0]).astype(np.float32),
                "mode": "lines" if len(kept) > 1 else "markers",
                "name": f"{i} {label(token)}",
                "meta": i,
                "line": {"color": PALETTE[i % len(PALETTE)], "width": 1.5},
                "visible": True if i in first else "legendonly",
                "hovertemplate": "%{fullData.name}<br>σ%{x} = %{y:.3g} σ1<extra></extra>",
            }
        )
    return draw(
        traces,
        x="singular value, the largest first",
        y="σ / σ1",
        legend={"maxheight": 0.9},
        yaxis={"type": "log", "exponentformat": "power", "dtick": 1 if _few_decades(tokens) else None},
    )


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
