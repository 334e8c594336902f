"""Results for people: terminal tables, a self-contained HTML page, notebook display, whole files."""

from loclin.output import check_writable, write_text
from loclin.report.attribution_page import attribution_fragment, attribution_html, write_attribution
from loclin.report.attribution_terminal import render_attribution, render_attribution_settings
from loclin.report.coverage import coverage_markdown, render_coverage
from loclin.report.figures import check_plotly
from loclin.report.generation import render_generation, write_generation
from loclin.report.layers_page import layers_fragment, layers_html, write_layers
from loclin.report.layers_terminal import render_layers
from loclin.report.notebook import explanation_fragment
from loclin.report.page import explanation_html, write_html
from loclin.report.terminal import render_explanation
from loclin.report.validity import render_validity, write_validity

__all__ = [
    "attribution_fragment",
    "attribution_html",
    "check_plotly",
    "check_writable",
    "coverage_markdown",
    "explanation_fragment",
    "explanation_html",
    "layers_fragment",
    "layers_html",
    "render_attribution",
    "render_attribution_settings",
    "render_coverage",
    "render_explanation",
    "render_generation",
    "render_layers",
    "render_validity",
    "write_attribution",
    "write_generation",
    "write_html",
    "write_layers",
    "write_text",
    "write_validity",
]
