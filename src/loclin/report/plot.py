"""What all figures share: plotly where it is installed, its script, colours, and a layout without any of its own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from loclin.errors import MissingExtraError

POSITIVE, NEGATIVE, NEUTRAL = "#3b82f6", "#ea6a12", "#8b93a1"
_MISSING = "an HTML page", "plotly", "html"
PALETTE = ["#3b82f6", "#ea6a12", "#12a150", "#a855f7", "#e0457b", "#0ea5b7", "#b58900", "#7c86f0"]


def check_plotly() -> None:
    """Refuse a page before any work is done for it.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError(*_MISSING)


def graph_objects() -> Any:
    """Plotly's figures and traces, imported when the first figure is drawn.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    try:
        import plotly.graph_objects as found
    except ImportError as missing:
        raise MissingExtraError(*_MISSING) from missing
    return found


def plotly_script() -> str:
    """Give plotly's own script, to be put into the page once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def plain() -> dict[str, Any]:
    """Give a figure's layout without colours of its own."""
    clear = "rgba(0,0,0,0)"
    return {"template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear, "hoverlabel": {"align": "left"}}
