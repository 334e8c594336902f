"""An explanation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from loclin.analyses.explain import Explanation
from loclin.report.explanation.tables import block_table, share_table, token_text, unit_table
from loclin.report.grid import show
from loclin.report.text import error, gate_note, outcome, percent

PROMPT_HEAD, PROMPT_TAIL = 40, 80
"""How much of a prompt is shown when it is longer than both together: its beginning and its end."""
RUNNERS_UP = 4


def render_explanation(explanation: Explanation, console: Console, top: int = 3) -> None:
    """Print an explanation: prediction, certificate, shares, singular vectors, rows and columns, warnings.

    Parameters
    ----------
    explanation
        From `loclin.analyses.explain.explain`.
    console
        Where to print; colours follow it, and nothing depends on them.
    top
        How many singular blocks of each token to show.
    """
    chosen = explanation.settings
    options = {name: chosen.get(name) for name in ("gate", "precision", "position")}
    options[""] = f"{chosen.get('source')} → {chosen.get('target')}"
    parts: list[Any] = [
        _prompt(explanation),
        _prediction(explanation),
        _verdict(explanation),
        Text(),
        Heading("Which tokens drive it", f"shares of the {explanation.target['kind']}: J_i x_i through the head"),
        *share_table(explanation),
        Text(gate_note(chosen.get("gate")), "dim"),
        Text(),
        Heading("What each token's map writes and reads", "its singular vectors"),
        *block_table(explanation, top),
        Text(),
        Heading("Rows and columns of largest norm", "the largest of each"),
        *unit_table(explanation),
        Text(),
        *(warning(text) for text in explanation.warnings),
        settings(explanation.model, options, chosen.get("versions", {})),
    ]
    show(console, *parts)


def warning(text: str) -> Panel:
    """Frame what a reader should know first."""
    return Panel(Text(text), title="warning", title_align="left", border_style="yellow")


@dataclass(frozen=True)
class Heading:
    """Write a title, and what stands below it; without its line where both would not fit."""

    title: str
    note: str

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        text = Text.assemble((self.title, "bold"), (f"  {self.note}", "dim"))
        yield text if text.cell_len + 2 > options.max_width else Rule(text, align="left", style="dim")


def _prompt(explanation: Explanation) -> Text:
    """Write the prompt token by token: every gap is a boundary, since its own spaces are drawn."""
    tokens = explanation.tokens
    shown = [token_text(token.text, "bold", token.is_sink) for token in tokens]
    hidden = len(tokens) - PROMPT_HEAD - PROMPT_TAIL
    if hidden > 0:
        shown[PROMPT_HEAD:-PROMPT_TAIL] = [Text(f"… {hidden} more tokens …", "dim italic")]
    return Text(" ").join(shown)


def _prediction(explanation: Explanation) -> Text:
    target = explanation.target
    line = Text("→ ", "bold green")
    line.append_text(token_text(target["text"], "bold green"))
    line.append(f" {percent(target['probability'])}", "green")
    chosen = (target["text"], target["probability"])
    others = [word for word in explanation.predictions if word != chosen]
    for i, (text, probability) in enumerate(others[:RUNNERS_UP]):
        line.append("   then " if i == 0 else "  ", "dim")
        line.append_text(token_text(text, ""))
        line.append(f" {percent(probability)}", "dim")
    return line


def _verdict(explanation: Explanation) -> Text:
    certificate = explanation.certificate
    reconstruction, forward, *_ = found = certificate.checks()
    name, style = ("EXACT", "bold green") if certificate.passed else ("NOT EXACT", "bold red")
    line = Text.assemble(
        (name, style),
        f" reconstruction {outcome(reconstruction)}, forward {outcome(forward)}",
        f", std {error(certificate.std_error)}",
        (f" (ordinary {error(explanation.ordinary_error)})", "dim"),
    )
    for check in found:
        if not check.passed:
            line.append(f"\n  {check.name} error {outcome(check)} is beyond {error(check.limit)}", "red")
    for culprit in certificate.culprits:
        text = f"{culprit.module} ({culprit.kind}) is not linear: error {error(culprit.error)}"
        line.append(f"\n  {text}", "red")
    return line


def settings(model: dict[str, Any], options: dict[str, Any], versions: dict[str, str]) -> Text:
    """Write what was run, and how, in a line."""
    used, stored = model.get("dtype", ""), model.get("stored_dtype", "")
    facts = [
        str(model.get("name", "")),
        str(used) if stored in ("", used) else f"{used} (stored as {stored})",
        *(f"{name} {value}".strip() for name, value in options.items()),
        " ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return Text(" · ".join(fact for fact in facts if fact), "dim")
