"""Results for people: terminal tables, a self-contained HTML page, notebook display, whole files."""

from loclin.analyses.attribution.result import Attribution
from loclin.analyses.explain import Explanation
from loclin.analyses.layers import LayerExplanation
from loclin.report.attribution.page import attribution_fragment, attribution_html, write_attribution
from loclin.report.attribution.terminal import render_attribution, render_attribution_settings
from loclin.report.coverage import coverage_markdown, render_coverage
from loclin.report.explanation.notebook import explanation_fragment
from loclin.report.explanation.page import explanation_html, write_html
from loclin.report.generation import render_generation, write_generation
from loclin.report.layers.page import layers_fragment, layers_html, write_layers
from loclin.report.layers.terminal import render_layers
from loclin.report.plot import check_plotly
from loclin.report.terminal import render_explanation
from loclin.report.validity import render_validity, write_validity
from loclin.results.display import as_html
from loclin.results.files import check_writable, write_text

as_html.register(Attribution)(attribution_fragment)
as_html.register(Explanation)(explanation_fragment)
as_html.register(LayerExplanation)(layers_fragment)

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
