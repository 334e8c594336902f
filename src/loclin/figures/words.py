"""Tables 1 to 3 and 5 to 7: what the first singular vectors of each token write, layer by layer."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment

from loclin.analyses.decode import SingularBlock
from loclin.analyses.layers import SHOWN, LayerExplanation
from loclin.common.arguments import strings, whole
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.figures.given import Layered, layered
from loclin.figures.names import HIGHLIGHTS, check_suffix
from loclin.report.text import percent, plain, visible
from loclin.results.files import write_text

TINTS = ("A6D3F2", "F7C6A0", "A9E0CB", "EBC4DA", "F5DFA0", "D0D0D0")
"""Light enough for black words on them, and told apart with any colour vision."""
_EXCERPT, _COLUMNS, _WORD = 3, 12, 16
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "…": r"\dots{}", '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ table.title }}</title>
<style>
body { font: 13px/1.45 system-ui, sans-serif; margin: 2em; color: #111; background: #fff }
table { border-collapse: collapse } caption { text-align: left; padding-bottom: .6em }
th, td { border-top: 1px solid #ccc; padding: .25em .5em; text-align: left; vertical-align: top }
mark { color: inherit; border-radius: 3px; padding: 0 .15em }
{% for tint in tints %}
mark.w{{ loop.index0 }} { background: #{{ tint }} }
{% endfor %}
</style></head><body>
<table><caption>{{ table.caption }}<br>Legend:
{% for word in table.legend %} <mark class="w{{ loop.index0 }}">{{ word }}</mark>{% endfor %}</caption>
<thead><tr><th></th>{% for token in table.tokens %}<th>{{ token }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th>{{ row.name }}</th>{% for cell in row.cells %}<td>
{%- for word in cell %}{% set at = table.mark(word) %}
{%- if at is none %}{{ word }}{% else %}<mark class="w{{ at }}">{{ word }}</mark>{% endif %}
{%- if not loop.last %} {% endif %}
{%- endfor %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% for warning in table.warnings %}<p>{{ warning }}</p>{% endfor %}
</body></html>
"""


@dataclass(frozen=True)
class WordRow:
    """One singular vector of one layer: its layer, its number or numbers from 1, and each token's words."""

    layer: int
    vector: str
    cells: list[list[str]]

    __repr__ = brief

    @property
    def name(self) -> str:
        """What stands in front of the row."""
        return f"Layer {self.layer} {self.vector}"


@dataclass(frozen=True)
class WordTable:
    """A table of words, a column for each token, as LaTeX, Markdown and HTML.

    Attributes
    ----------
    title, caption: what it is.
    tokens: the texts above the columns.
    rows: of each layer the first vectors.
    legend: the words that are highlighted, also with another case, a space, or a plural's s.
    warnings: those of the result, and what is left out.
    """

    title: str
    caption: str
    tokens: list[str]
    rows: list[WordRow]
    legend: list[str]
    warnings: list[str] = field(default_factory=list)

    __repr__ = brief

    def mark(self, word: str) -> int | None:
        """Find the number of the highlighted word that a word is; None: it is none."""
        stem = _stem(word)
        return next((i for i, one in enumerate(self.legend) if _stem(one) == stem), None)

    def latex(self) -> str:
        """Write it as LaTeX, which needs the packages xcolor, array, booktabs, textcomp and longtable.

        Any engine typesets Latin scripts; LuaLaTeX or XeLaTeX, with a font that has them, all others.
        """
        size = f"{0.86 / len(self.tokens):.3f}"
        columns = "@{}l" + rf">{{\raggedright\arraybackslash}}p{{{size}\linewidth}}" * len(self.tokens) + "@{}"
        tints = [f"\\definecolor{{loclin{i}}}{{HTML}}{{{TINTS[i]}}}" for i, _ in enumerate(self.legend)]
        legend = ", ".join(_tinted(word, i) for i, word in enumerate(self.legend))
        heads = " & ".join(["", *map(_latex, self.tokens)])
        body = [" & ".join([_latex(row.name), *map(self._latex_cell, row.cells)]) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"% needs \usepackage{xcolor,array,booktabs,textcomp,longtable}; other scripts: LuaLaTeX",
                *(f"% {plain(warning)}" for warning in self.warnings),
                *tints,
                r"{\setlength{\fboxsep}{0.6pt}\setlength{\tabcolsep}{2pt}\scriptsize",
                rf"\begin{{longtable}}{{{columns}}}",
                rf"\caption{{{_latex(self.caption)} Legend: {legend}.}}\\",
                r"\toprule",
                heads + r" \\",
                r"\midrule\endhead",
                *body,
                r"\bottomrule",
                r"\end{longtable}}",
                "",
            ]
        )

    def markdown(self) -> str:
        """Write it as Markdown: highlighted words are bold, with their number in the legend."""
        legend = ", ".join(f"{_bold(word, i)}" for i, word in enumerate(self.legend))
        lines = [["", *map(_escape, self.tokens)], ["---"] * (1 + len(self.tokens))]
        lines += [[row.name, *map(self._markdown_cell, row.cells)] for row in self.rows]
        table = ["| " + " | ".join(cells) + " |" for cells in lines]
        notes = [f"\n{_escape(warning)}" for warning in self.warnings]
        return "\n".join([_escape(self.caption) + f" Legend: {legend}.", "", *table, *notes, ""])

    def html(self) -> str:
        """Write it as an HTML page that needs no other file."""
        page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_HTML)
        return page.render(table=self, tints=TINTS[: len(self.legend)])

    _repr_html_ = html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as .tex, .md or .html, completely or not at all; OutputError where that cannot be."""
        forms = {".tex": self.latex, ".md": self.markdown, ".html": self.html}
        write_text(path, forms[check_suffix(path, tuple(forms))]())

    def _latex_cell(self, cell: list[str]) -> str:
        marked = ((word, self.mark(word)) for word in cell)
        return " ".join(_latex(word) if at is None else _tinted(word, at) for word, at in marked)

    def _markdown_cell(self, cell: list[str]) -> str:
        marked = ((word, self.mark(word)) for word in cell)
        return " ".join(_escape(word) if at is None else _bold(word, at) for word, at in marked)


def table_1(
    found: Layered, *, layers: Sequence[int] | None = None, highlight: Sequence[str] | None = None
) -> WordTable:
    """What the first three left vectors of each token's map to a layer write (paper, Tables 1 to 3; section 3.5).

    A row for each vector and layer, a column for each input token i. The vectors are those of J_i from the embeddings
    to the residual stream after the layer, followed by the frozen final norm, put into words by the output head. Where
    a token's singular values are near-equal, the first one's cell has the words of their subspace, and those of the
    others are empty. Of more than 12 tokens, the last 12.

    Parameters
    ----------
    found: from `loclin.linearize` or `loclin.explain_layers`.
    layers: which layers. None: three, from the first one whose joint map's first left vector has the predicted word
        among its first ten words; the last three if none has.
    highlight: up to six words to highlight. None: the predicted word, and those that most cells have.

    Raises OptionError for layers that there are not, or too many words. Cost: `loclin.explain_layers` of a linearized
    prompt.
    """
    return _tabulate(found, layers, highlight, _EXCERPT)


def table_5(
    found: Layered, *, layers: Sequence[int] | None = None, highlight: Sequence[str] | None = None
) -> WordTable:
    """The same as `table_1` to the last layer (paper, Tables 5 to 7; appendix A.4).

    `layers`: None: from the first one there to the last; all layers if the predicted word appears in none.
    `found`, `highlight`, errors, cost: see there.
    """
    return _tabulate(found, layers, highlight, None)


table_2 = table_3 = table_1
table_6 = table_7 = table_5


def _tabulate(
    found: Layered, layers: Sequence[int] | None, highlight: Sequence[str] | None, most: int | None
) -> WordTable:
    if highlight is not None and len(strings("highlight", highlight)) > HIGHLIGHTS:
        raise OptionError(f"highlight={list(highlight)}: give at most {HIGHLIGHTS} words")
    result = layered(found, components=["resid_post"])
    first = max(0, len(result.tokens) - _COLUMNS)
    target, vectors = visible(result.target["text"]), result.main.token_vectors
    if layers is None:
        layers = _find_layers(result, most)
    for layer in layers:
        whole("layer", layer, 0, result.n_layers - 1)
    rows = [row for layer in layers for row in _rows(layer, vectors[layer][first:])]
    legend = _common(rows, target) if highlight is None else [visible(word) for word in highlight]
    known = result.provenance
    caption = (
        f"The first {SHOWN} singular vectors of each token's exact map to a layer's output, in words: "
        f"{known.model.name} for “{plain(known.text)}”, with the prediction {target} "
        f"({percent(result.target['probability'])})."
    )
    left_out = [f"The last {_COLUMNS} of {len(result.tokens)} tokens are shown."] if first else []
    inexact = [] if result.passed else [f"NOT EXACT: the largest error is {result.largest_error:.1e}."]
    return WordTable(
        title=f"{known.model.name}: layer words",
        caption=caption,
        tokens=[visible(text, _WORD) for text in result.tokens[first:]],
        rows=rows,
        legend=legend,
        warnings=[*inexact, *result.warnings, *left_out],
    )


def _rows(layer: int, tokens: Sequence[Sequence[SingularBlock]]) -> Iterator[WordRow]:
    """Write the rows of one layer: a block of near-equal values has its words in the row of its first vector."""
    for rank in range(SHOWN):
        found = [next((block for block in blocks if block.indices[0] == rank), None) for blocks in tokens]
        cells = [[visible(word, _WORD) for word, _ in block.writes] if block else [] for block in found]
        yield WordRow(layer, f"u{rank + 1}", cells)


def _find_layers(result: LayerExplanation, most: int | None) -> range:
    """Choose so many layers from where the predicted word appears; all the later ones for None."""
    appears, last = result.appears.get(f"{result.main.name} joint"), result.n_layers
    first = max(0, last - (most or last)) if appears is None else appears
    first = max(0, min(first, last - (most or 1)))
    return range(first, last if most is None else min(last, first + most))


def _common(rows: Sequence[WordRow], target: str) -> list[str]:
    """Find the words to highlight: the predicted one, and those of three letters and more that most cells have."""
    count: Counter[str] = Counter()
    for row in rows:
        for cell in row.cells:
            count.update({stem for word in cell if len(stem := _stem(word)) > 2 and stem.isalpha()} - {_stem(target)})
    shown: dict[str, str] = {}
    for word in (word for row in rows for cell in row.cells for word in cell):
        shown.setdefault(_stem(word), word)
    return [target, *(shown[stem] for stem, often in count.most_common(HIGHLIGHTS - 1) if often > 1)]


def _stem(word: str) -> str:
    """Reduce a word to what it shares with its other spellings: case, spaces and a plural's s do not count."""
    bare = word.strip(" ·").casefold()
    return bare[:-1] if len(bare) > 3 and bare.endswith("s") and not bare.endswith("ss") else bare


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _tinted(word: str, number: int) -> str:
    return rf"\colorbox{{loclin{number}}}{{{_latex(word)}}}"


def _escape(text: str) -> str:
    return re.sub(r"([\\|<>*_`\[\]#~])", r"\\\1", text)


def _bold(word: str, number: int) -> str:
    return f"**{_escape(word)}**<sup>{number + 1}</sup>"
