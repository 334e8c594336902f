"""What was run: the one place that reads a result's model, settings and provenance for a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rich.text import Text

from loclin.common.brief import brief
from loclin.report.text import number, plain, signed, token
from loclin.results.provenance import Provenance

_UNSAID = ("versions", "token_ids", "model", "certificate", "text", "tokens", "positions")
"""What is too long for a list of facts, or is said elsewhere."""


@dataclass(frozen=True)
class Run:
    """Which model and options a result is of; empty where that is not known."""

    model: Mapping[str, Any] = field(default_factory=dict)  # as `ModelInfo.to_dict()` gives it
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()  # what a terminal's line says besides

    __repr__ = brief

    @property
    def gate(self) -> str:
        """Say which of several exact sets of shares is shown."""
        gate, agrees = self.options.get("gate"), "half agrees best with removing tokens (docs/faithfulness.md)"
        if gate == "half":
            return f"Gate {agrees}; another gate gives other shares."
        return f"Gate {gate}. Another gate gives other shares; {agrees}."

    @property
    def line(self) -> Text:
        """All that matters, in a line."""
        used, stored = self.model.get("dtype", ""), self.model.get("stored_dtype", "")
        named = (f"{n} {self.options[n]}" for n in ("gate", "precision", "position") if self.options.get(n) is not None)
        split = self.options.get("split")
        facts = [
            str(self.model.get("name", "")),
            str(used) if stored in ("", used) else f"{used} (stored as {stored})",
            *named,
            f"split: {split}" if split else "",
            *self.more,
            " ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        return Text(" · ".join(plain(fact) for fact in facts if fact), "dim")

    @property
    def facts(self) -> dict[str, str]:
        """All of it, by name."""
        model = {f"model {name}": value for name, value in self.model.items()}
        options = {name: value for name, value in self.options.items() if name not in _UNSAID}
        known = model | options | dict(self.versions)
        return {name: str(value) for name, value in known.items() if value is not None}


def _known(result: Any) -> Provenance | None:
    """A result's provenance, which a map gives when it is asked."""
    known: Provenance | None = result.provenance() if callable(result.provenance) else result.provenance
    return known


def run_of(result: Any) -> Run:
    """Find out what a result is of."""
    settings, known = dict(getattr(result, "settings", {})), _known(result)
    if known is None:
        return Run(settings.get("model", {}), settings, getattr(result, "versions", {}))
    options = {field.name: getattr(known, field.name) for field in fields(known)} | settings
    return Run(known.model.to_dict(), options, known.versions)


def prompt(result: Any) -> str:
    """Give a result's prompt; nothing where it has none."""
    known = _known(result)
    return "" if known is None else known.text


def tokens(result: Any) -> list[str]:
    """Give the prompt's tokens as they are shown; none where they are not known."""
    known = _known(result)
    return [] if known is None else known.tokens


def wanted(target: Mapping[str, Any]) -> Text:
    """Write the tokens of a target: what is looked at, and what is taken off it."""
    sides = [side["tokens"] for side in (target, target.get("against")) if side]
    if target["kind"] in ("logit difference", "logit margin"):
        sides = [[text] for text in target["tokens"]]
    each = (Text(", ").join(token(text, "bold green") for text in texts) for texts in sides)
    return Text(" − ").join(each)


def moved(target: Mapping[str, Any], value: float) -> Text:
    """Write a target with its value, and another value that it has elsewhere."""
    lead = Text.assemble((f"{target['kind']} ", "green"), wanted(target))
    lead.append(f" {number(target['value'])} → {number(value)}", "bold")
    return lead.append(f"   {signed(value - target['value'])}")
