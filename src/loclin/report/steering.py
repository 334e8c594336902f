"""A normal and a steered text side by side, with the sweep that found the strength; terminal and page."""

from __future__ import annotations

import json
import os
import re
from html import escape
from string import Template
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from loclin.report import html as parts
from loclin.report.assets import asset
from loclin.report.grid import WIDEST, Cell, Column, Grid, show
from loclin.report.plot import NEUTRAL, PALETTE, graph_objects, plotly_script
from loclin.report.sheet import embedded
from loclin.report.terminal import warning
from loclin.report.text import number, visible
from loclin.results.files import write_text
from loclin.steering.search import Continuation, Trial
from loclin.steering.steer import METHODS, Steered


def render_steered(found: Steered, console: Console) -> None:
    """Print both texts, what they cost, and the sweep."""
    width = min(console.width, WIDEST)
    half = (width - 1) // 2 if width >= 80 else width
    panels = [
        Panel(_text(found, text), title=f"[bold]{name}[/]", title_align="left", width=half, border_style=style)
        for name, text, style in (("normal", found.normal, "dim"), ("steered", found.steered, "green"))
    ]
    printed: list[RenderableType] = [
        Columns(panels, padding=(0, 1)),
        _facts(found),
        _what(found),
        *(warning(text) for text in found.warnings),
    ]
    if found.sweep is not None:
        limit = f"gain / KL, mean over prompts; at most KL {found.sweep.max_kl:g}"
        printed += [Text(), Text(limit, "italic"), _sweep(found)]
    show(console, *printed)


def _text(found: Steered, written: Continuation) -> Text:
    line = Text(_plain(found.prompt), "dim")
    said = Text(_plain(written.text))
    if (pattern := _pattern(found.words)) is not None:
        said.highlight_regex(pattern, "bold green")
    line.append_text(said)
    return line.append(" ⏹ end of text" if written.ended else " …", "dim")


def _plain(text: str) -> str:
    """A text with its own lines and spaces, and nothing in it that could act on a terminal."""
    return "\n".join(visible(line).replace("·", " ") if line else "" for line in text.split("\n"))


def _pattern(words: list[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def _facts(found: Steered) -> Grid:
    table = Grid.of(Column("text", "key"), Column("normal"), Column("steered"))
    for name, normal, steered in _rows(found):
        table.add(name, normal, steered)
    return table


def _rows(found: Steered) -> list[tuple[str, str, str]]:
    """The two texts' numbers, in words."""
    normal, steered = found.normal, found.steered
    return [
        ("the concept's words, per hundred", f"{normal.frequency:.1f}", f"{steered.frequency:.1f}"),
        ("loss of the unsteered model, nats per token", f"{normal.loss:.2f}", f"{steered.loss:.2f}"),
        ("repeated three-token sequences", f"{normal.repetition:.0%}", f"{steered.repetition:.0%}"),
        ("next token: gain of the words, nats", "", f"{found.gain:+.2f}"),
        ("next token: KL from the unsteered one, nats", "", f"{found.kl:.2f}"),
    ]


def _what(found: Steered) -> Text:
    text = Text(f"{_described(found)}\n", "dim")
    return text.append(f"words: {', '.join(map(visible, found.words))}", "dim")


def _described(found: Steered) -> str:
    how = METHODS.get(found.method, found.method)  # type: ignore[call-overload]
    point = found.settings["point"]
    gate = f" · gate {found.settings['gate']}" if found.method in ("operator", "basis", "suffix") else ""
    return f"{found.model['name']} · {found.method}: {how} · {point} · strength {found.strength:g} ({found.form}){gate}"


def _sweep(found: Steered) -> Grid:
    sweep = found.sweep
    assert sweep is not None
    strengths = sorted({trial.strength for trial in sweep.trials}, reverse=found.form == "interpolate")
    table = Grid.of(Column("layer", "key"), *(Column(f"{strength:g}") for strength in strengths))
    cells = {(trial.layer, trial.strength): trial for trial in sweep.trials}
    for layer in sorted({trial.layer for trial in sweep.trials}):
        row: list[Cell] = []
        for strength in strengths:
            trial = cells.get((layer, strength))
            style = "bold green" if trial == sweep.best else "" if trial and trial.kl <= sweep.max_kl else "dim"
            row.append(Text("not finite" if trial is None else f"{trial.gain:+.2f} / {trial.kl:.2f}", style))
        table.add(str(layer), *row)
    return table


def write_steered_html(found: Steered, path: str | os.PathLike[str]) -> None:
    """Write the page to a file, whole or not at all.

    Raises
    ------
    OutputError
        When plotly is not installed or the file cannot be written.
    """
    write_text(path, steered_html(found))


def steered_html(found: Steered) -> str:
    """Write both texts, their numbers and the sweep as one self-contained HTML page.

    Raises
    ------
    MissingExtraError
        When plotly is not installed.
    """
    figure = _figure(found)
    return Template(asset("steer.html")).substitute(
        css=asset("page.css"),
        plotly="" if figure is None else plotly_script(),
        figure=embedded(figure),
        title=escape(visible(found.prompt, 60).replace("·", " ")),
        toward=", ".join(f"“{escape(text)}”" for text in found.toward),
        normal=_html(found, found.normal),
        steered=_html(found, found.steered),
        warnings=parts.warnings(found),
        rows="".join(
            f'<tr><th scope="row">{escape(name)}</th><td class="num">{a}</td><td class="num">{b}</td></tr>'
            for name, a, b in _rows(found)
        ),
        how=escape(_described(found)),
        words=escape(", ".join(map(visible, found.words))),
        hidden="hidden" if figure is None else "",
        limit=number(found.sweep.max_kl) if found.sweep else "",
        table=_html_sweep(found),
        settings=_settings(found),
    )


def _html(found: Steered, written: Continuation) -> str:
    said = _plain(written.text)
    pattern, marked, last = _pattern(found.words), [], 0
    for hit in pattern.finditer(said) if pattern else ():
        marked += [escape(said[last : hit.start()]), f"<mark>{escape(hit[0])}</mark>"]
        last = hit.end()
    end = ' <span class="note">⏹ end of text</span>' if written.ended else " …"
    return f'<span class="note">{escape(_plain(found.prompt))}</span>{"".join(marked)}{escape(said[last:])}{end}'


def _html_sweep(found: Steered) -> str:
    if found.sweep is None:
        return ""
    rows = (
        f"<tr{' class=current' if trial == found.sweep.best else ''}>"
        + "".join(f'<td class="num">{cell}</td>' for cell in _cells(trial))
        + "</tr>"
        for trial in found.sweep.trials
    )
    heads = "".join(
        f'<th scope="col" class="num">{name}</th>'
        for name in ("layer", "strength", "gain", "KL", "words per hundred", "repeated")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cells(trial: Trial) -> list[str]:
    """One setting's numbers; those of its text only where it wrote one."""
    text = trial.written
    said = ["", ""] if text is None else [f"{text.frequency:.1f}", f"{text.repetition:.0%}"]
    return [str(trial.layer), f"{trial.strength:g}", f"{trial.gain:+.2f}", f"{trial.kl:.2f}", *said]


def _settings(found: Steered) -> str:
    facts = {f"model {k}": v for k, v in found.model.items() if v is not None}
    facts |= {k: v for k, v in found.settings.items() if k not in ("versions", "token_ids")} | found.settings[
        "versions"
    ]
    return "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())


def _figure(found: Steered) -> Any:
    """Gain against KL: a line for each layer, a marker for each strength."""
    if found.sweep is None:
        return None
    go = graph_objects()
    sweep, figure = found.sweep, go.Figure()
    for n, layer in enumerate(sorted({trial.layer for trial in sweep.trials})):
        own = [trial for trial in sweep.trials if trial.layer == layer]
        figure.add_scatter(
            x=[0.0, *(trial.kl for trial in own)],
            y=[0.0, *(trial.gain for trial in own)],
            text=["unsteered", *(f"layer {layer}, strength {trial.strength:g}" for trial in own)],
            hovertemplate="%{text}<br>gain %{y:.2f}, KL %{x:.2f}<extra></extra>",
            mode="lines+markers",
            name=f"layer {layer}",
            line={"color": PALETTE[n % len(PALETTE)], "width": 2},
        )
    figure.add_scatter(
        x=[sweep.best.kl], y=[sweep.best.gain], mode="markers", name="chosen", hoverinfo="skip",
        marker={"size": 16, "symbol": "circle-open", "color": NEUTRAL, "line": {"width": 3}},
    )  # fmt: skip
    figure.add_vline(x=sweep.max_kl, line={"color": NEUTRAL, "dash": "dot", "width": 1})
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none", paper_bgcolor=clear, plot_bgcolor=clear, margin={"l": 60, "r": 12, "t": 12, "b": 48},
        xaxis_title="fluency lost: KL from the unsteered prediction, nats",
        yaxis_title="gain of the words, nats",
    )  # fmt: skip
    return json.loads(figure.to_json())
