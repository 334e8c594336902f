"""How results look: each room's results are described once, and drawn on terminals, pages and in notebooks."""

from loclin.analyses.explain import Explanation
from loclin.analyses.exploration.result import Exploration
from loclin.analyses.layers import LayerExplanation
from loclin.report import (  # noqa: F401 (what they import registers a description for each class)
    attribution,
    coverage,
    disruption,
    estimate,
    explanation_page,
    explorer_page,
    faithfulness,
    generation,
    html,
    interventions,
    layers_page,
    maps,
    patching,
    prompt_comparison,
    sheet,
    steering,
    validity,
)
from loclin.results import display

for _kind in sheet.describe.registry:
    if _kind is not object:
        display.fragment.register(_kind, html.fragment)
        display.page.register(_kind, html.page)
        display.show.register(_kind, sheet.show)
display.page.register(Explanation)(explanation_page.page)
display.page.register(LayerExplanation)(layers_page.page)
display.page.register(Exploration)(explorer_page.page)
