"""An explanation as an interactive page: a token is chosen, and its map is shown in words."""

from __future__ import annotations

from typing import Any

from loclin.analyses.decode import Words
from loclin.analyses.explain import Explanation, TokenExplanation, Unit
from loclin.report.certificate import check_table
from loclin.report.explanation.figures import figures, spectrum_points
from loclin.report.explanation.sheet import describe_explanation, largest, summary
from loclin.report.html import write_page
from loclin.report.text import error, number, sigmas, signed, token, visible

_WORD = 28


def explanation_page(explanation: Explanation) -> str:
    """Write an explanation as a self-contained, interactive HTML page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    sheet, target, tokens = describe_explanation(explanation), explanation.target, explanation.tokens
    data = {
        "tokens": [_token(i, part, target["kind"]) for i, part in enumerate(tokens)],
        "selected": _first_selected(tokens),
        "figures": figures(explanation),
    }
    return write_page(
        "explanation.html",
        sheet,
        data,
        "explanation.js",
        found=explanation,
        target=token(target["text"]),
        checks=check_table(explanation.certificate, explanation.ordinary_error),
        shares=sheet.sections[0],
        bias=signed(explanation.bias_share),
        words_share=signed(sum(part.share for part in tokens)),
        rounding=error(abs(explanation.share_residual)),
        names=[f"{i} {visible(part.text, 24)}" for i, part in enumerate(tokens)],
        spectra_note=_spectra_note(explanation),
    )


def _token(index: int, part: TokenExplanation, kind: str) -> dict[str, Any]:
    """Give what the page shows of a selected token; numbers are ready to be shown."""
    return {
        "text": visible(part.text),
        "about": summary(index, part),
        "facts": [
            [f"share of the {kind}", signed(part.share)],
            ["Frobenius norm", number(part.frobenius_norm)],
            ["stable rank", number(part.stable_rank)],
            ["token id", str(part.id)],
        ],
        "blocks": [
            {
                "name": sigmas(block.indices),
                "values": ", ".join(number(value) for value in block.values),
                "size": block.values[0] / part.blocks[0].values[0],
                "gain": None if block.gain is None else signed(block.gain),
                "writes": _words(block.writes),
                "reads": _words(block.reads),
            }
            for block in part.blocks
        ],
        "rows": [_unit(unit) for unit in part.rows],
        "columns": [_unit(unit) for unit in part.columns],
    }


def _unit(unit: Unit) -> dict[str, Any]:
    return {"index": unit.index, "norm": number(unit.norm), "words": _words(unit.words)}


def _words(words: Words) -> list[list[Any]]:
    return [[visible(text, _WORD), float(f"{score:.3g}")] for text, score in words]


def _first_selected(tokens: list[TokenExplanation]) -> int:
    """Choose the token to show first: the largest |share|, sinks aside."""
    chosen = [i for i, part in enumerate(tokens) if not part.is_sink] or list(range(len(tokens)))
    return max(chosen, key=lambda i: abs(tokens[i].share))


def _spectra_note(explanation: Explanation) -> str:
    points, length = spectrum_points(explanation), max(len(t.singular_values) for t in explanation.tokens)
    shown = len(largest(explanation.tokens, 6))
    note = "A token in the legend shows or hides its curve; the selected one is drawn bold."
    if shown < len(explanation.tokens):
        note += f" At first: the {shown} largest shares."
    if points < length:
        note += f" Curves are thinned to about {points} of {length} points."
    return note
