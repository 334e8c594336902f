"""Results for people: terminal tables, a self-contained HTML page, notebook display, whole files."""

from loclin.output import check_writable, write_text
from loclin.report.coverage import coverage_markdown, render_coverage
from loclin.report.figures import check_plotly
from loclin.report.layers_page import layers_fragment, layers_html, write_layers
from loclin.report.layers_terminal import render_layers
from loclin.report.notebook import explanation_fragment
from loclin.report.page import explanation_html, write_html
from loclin.report.terminal import render_explanation

__all__ = [
    "check_plotly",
    "check_writable",
    "coverage_markdown",
    "explanation_fragment",
    "explanation_html",
    "layers_fragment",
    "layers_html",
    "render_coverage",
    "render_explanation",
    "render_layers",
    "write_html",
    "write_layers",
    "write_text",
]
