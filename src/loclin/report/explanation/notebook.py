"""An explanation in a notebook: static HTML, without scripts, in the notebook's own colours."""

from __future__ import annotations

from html import escape

from loclin.analyses.explain import Explanation
from loclin.report import html as parts
from loclin.report.assets import asset
from loclin.report.choose import largest
from loclin.report.text import gate_note

ROWS = 24
PREDICTIONS = 5


def explanation_fragment(explanation: Explanation) -> str:
    """Write an explanation as a compact piece of HTML for a notebook's output, without scripts.

    Of a long prompt the table shows the tokens with the largest |share|, and says so.
    """
    tokens = explanation.tokens
    shown = largest(tokens, ROWS)
    style = asset("notebook.css")
    warnings = parts.warnings(explanation)
    note = escape(gate_note(explanation.settings.get("gate")))
    return (
        f'<div class="loclin"><style>{style}</style>'
        f'<div class="chips">{parts.chips(explanation)}</div>'
        f"{parts.predictions(explanation, PREDICTIONS)}{parts.verdict(explanation)}{warnings}"
        f'<div class="scroll">{parts.token_table(explanation, shown)}</div><p class="note">{note}</p></div>'
    )
