"""What all figures share: plotly where it is installed, its script, colours, and a layout without any of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loclin.errors import MissingExtraError

POSITIVE, NEGATIVE, NEUTRAL = "#3b82f6", "#ea6a12", "#8b93a1"
PALETTE = [POSITIVE, NEGATIVE, "#12a150", "#a855f7", "#e0457b", "#0ea5b7", "#b58900", "#7c86f0"]
ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def plotly_script() -> str:
    """Give plotly's own script, to be put into the page once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def draw(
    traces: Sequence[Mapping[str, Any]],
    *,
    x: str | None,
    y: str,
    legend: Mapping[str, Any] | None = None,
    **layout: Any,
) -> dict[str, Any]:
    """Make a figure as plain data, with its axes' titles; None for no legend. The page gives it its colours."""
    try:
        from plotly.graph_objects import Figure
    except ImportError as missing:
        raise MissingExtraError("an HTML page", "plotly", "html") from missing
    clear = "rgba(0,0,0,0)"
    figure = Figure(
        [dict(trace) for trace in traces],
        {"template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear, "hoverlabel": {"align": "left"}},
    )
    figure.update_layout(
        showlegend=legend is not None,
        legend=legend,
        margin={"l": 70, "r": 12, "t": 44 if legend == ABOVE else 12, "b": 48},
        xaxis_title=x,
        yaxis_title=y,
        **layout,
    )
    return dict(json.loads(figure.to_json()))


def curve(x: Iterable[Any], y: Any, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """Make a trace of points joined by lines."""
    line = {"color": colour, "width": 2} | more.pop("line", {})
    return {"type": "scatter", "x": list(x), "y": y, "mode": "lines+markers", "name": name, "line": line} | more
