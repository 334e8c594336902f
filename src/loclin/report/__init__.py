"""How results look: each room's results are described once, and drawn on terminals, pages and in notebooks."""

from loclin.analyses.explain import Explanation
from loclin.analyses.layers import LayerExplanation
from loclin.report import (  # noqa: F401 (what they import registers a description for each class)
    attribution,
    certificate,
    coverage,
    faithfulness,
    generation,
    heads,
    html,
    maps,
    sheet,
    similarity,
    spectra,
    steering,
    validity,
    watch,
)
from loclin.report.attribution import sheet as _attribution  # noqa: F401
from loclin.report.explanation.page import explanation_page
from loclin.report.layers.page import layers_page
from loclin.results import display

for _kind in sheet.describe.registry:
    if _kind is not object:
        display.fragment.register(_kind, html.fragment)
        display.page.register(_kind, html.page)
        display.show.register(_kind, sheet.show)
display.page.register(Explanation)(explanation_page)
display.page.register(LayerExplanation)(layers_page)
