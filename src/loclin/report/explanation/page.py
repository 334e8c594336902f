"""An explanation as one HTML file that needs nothing else: no network, no other files."""

from __future__ import annotations

import json
import os
from html import escape
from string import Template
from typing import Any

from loclin.analyses.decode import Words
from loclin.analyses.explain import Explanation, TokenExplanation, Unit
from loclin.maps.certificate import Check
from loclin.report import html as parts
from loclin.report.assets import asset
from loclin.report.choose import largest
from loclin.report.explanation.figures import figures, spectrum_points
from loclin.report.plot import plotly_script
from loclin.report.sheet import embedded, facts, listed, shortened
from loclin.report.text import error, gate_note, number, outcome, percent, sigmas, signed, visible
from loclin.results.files import write_text

_WORD = 28


def explanation_html(explanation: Explanation) -> str:
    """Write an explanation as a self-contained, interactive HTML page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    drawn = figures(explanation)
    target = explanation.target
    data = {
        "tokens": [_token(i, token, target["kind"]) for i, token in enumerate(explanation.tokens)],
        "selected": _first_selected(explanation.tokens),
        "figures": {name: json.loads(figure.to_json()) for name, figure in drawn.items()},
    }
    return Template(asset("page.html")).substitute(
        css=asset("page.css"),
        script=asset("shared.js", "page.js"),
        plotly=plotly_script(),
        data=embedded(data),
        title=escape(shortened(explanation.prompt)),
        chips=parts.chips(explanation, "button"),
        warnings=parts.warnings(explanation),
        target=parts.token(target["text"]),
        probability=percent(target["probability"]),
        kind=escape(target["kind"]),
        value=number(target["value"]),
        logit=number(target["logit"]),
        gate=escape(gate_note(explanation.settings.get("gate"))),
        bias=signed(explanation.bias_share),
        words_share=signed(sum(token.share for token in explanation.tokens)),
        rounding=error(abs(explanation.share_residual)),
        predictions=parts.predictions(explanation),
        certificate=_certificate(explanation),
        options=_options(explanation),
        spectra_note=_spectra_note(explanation),
        table=parts.token_table(explanation),
        settings=_settings(explanation),
    )


def write_html(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Write an explanation's page to a file, whole or not at all.

    Raises
    ------
    OutputError
        When plotly is not installed or the file cannot be written.
    """
    write_text(path, explanation_html(explanation))


def _token(index: int, token: TokenExplanation, kind: str) -> dict[str, Any]:
    """Give what the page shows of a selected token; numbers are ready to be shown."""
    return {
        "text": visible(token.text),
        "about": parts.describe(index, token),
        "sink": token.is_sink,
        "facts": [
            [f"share of the {kind}", signed(token.share)],
            ["Frobenius norm", number(token.frobenius_norm)],
            ["stable rank", number(token.stable_rank)],
            ["token id", str(token.id)],
        ],
        "blocks": [
            {
                "name": sigmas(block.indices),
                "values": ", ".join(number(value) for value in block.values),
                "size": block.values[0] / token.blocks[0].values[0],
                "gain": None if block.gain is None else signed(block.gain),
                "writes": _words(block.writes),
                "reads": _words(block.reads),
            }
            for block in token.blocks
        ],
        "rows": [_unit(unit) for unit in token.rows],
        "columns": [_unit(unit) for unit in token.columns],
    }


def _unit(unit: Unit) -> dict[str, Any]:
    return {"index": unit.index, "norm": number(unit.norm), "words": _words(unit.words)}


def _words(words: Words) -> list[list[Any]]:
    return [[visible(text, _WORD), float(f"{score:.3g}")] for text, score in words]


def _first_selected(tokens: list[TokenExplanation]) -> int:
    """Choose the token to show first: the largest |share|, sinks aside."""
    words = [i for i, token in enumerate(tokens) if not token.is_sink] or list(range(len(tokens)))
    return max(words, key=lambda i: abs(tokens[i].share))


def _certificate(explanation: Explanation) -> str:
    certificate = explanation.certificate
    culprits = "".join(
        f"<li><code>{escape(c.module)}</code> ({escape(c.kind)}): error {error(c.error)}</li>"
        for c in certificate.culprits
    )
    if culprits:
        culprits = f"<p>Not linear, although their coefficients are held:</p><ul>{culprits}</ul>"
    asides = (
        (
            "std error",
            "std(Jx + b − y) / std(y)",
            "The paper's metric for the frozen map.",
            certificate.std_error,
        ),
        ("ordinary Jacobian", "the same", "What it is when nothing is held.", explanation.ordinary_error),
        ("bias share", "|b| / |y|", "How much of the output comes from biases.", certificate.bias_share),
    )
    tiles = [_check(check) for check in certificate.checks()]
    tiles += [_tile("aside", name, symbols, meaning, error(value)) for name, symbols, meaning, value in asides]
    return f'{parts.verdict(explanation)}{culprits}<ul class="checks">{"".join(tiles)}</ul>'


def _check(check: Check) -> str:
    kind, mark, said = ("yes", "✓", "passed") if check.passed else ("no", "✗", "failed")
    limit = (
        f' <small>at most {error(check.limit)}</small> <span class="mark" aria-hidden="true">{mark}</span>'
        f'<span class="unseen">{said}</span>'
    )
    return _tile(kind, check.name, check.formula, check.meaning, outcome(check) + limit)


def _tile(kind: str, name: str, symbols: str, meaning: str, value: str) -> str:
    return (
        f'<li class="{kind}"><div><b>{name}</b> <code>{escape(symbols)}</code></div>'
        f'<div class="value">{value}</div><small>{escape(meaning)}</small></li>'
    )


def _options(explanation: Explanation) -> str:
    return "".join(
        f'<option value="{i}">{i} {escape(visible(token.text, 24))}</option>'
        for i, token in enumerate(explanation.tokens)
    )


def _spectra_note(explanation: Explanation) -> str:
    points, length = spectrum_points(explanation), max(len(t.singular_values) for t in explanation.tokens)
    shown = len(largest(explanation.tokens, 6))
    note = "A token in the legend shows or hides its curve; the selected one is drawn bold."
    if shown < len(explanation.tokens):
        note += f" At first: the {shown} largest shares."
    if points < length:
        note += f" Curves are thinned to about {points} of {length} points."
    return note


def _settings(explanation: Explanation) -> str:
    return listed(facts(explanation.model, explanation.settings))
