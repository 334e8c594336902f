"""What disrupt and recover says of attribution methods, in a table."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from loclin.analyses.faithfulness.disruption import Disruption
from loclin.analyses.faithfulness.scores import ADDITIVE, BEST_EXACT
from loclin.analyses.faithfulness.summary import Interval, interval
from loclin.report.run import run_of
from loclin.report.sheet import PAGE, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table
from loclin.report.text import error

_HEADER = ("disrupt − recover", "disrupt", "recover", "the best exact one is ahead by", "misses its sum by")
_NAMES = {
    "frozen/activation": "frozen map, gate activation",
    "frozen/up": "frozen map, gate up",
    "frozen/half": "frozen map, gate half",
}
_ALIKE = {"frozen/half/logit": " (= RelP)", "shared/¼ ¼ ½/logit": " (= AttnLRP, DPA)"}
"""Published methods whose numbers are these: the same rules at norms, gates, activations and attention."""


@describe.register
def _describe_disruption(study: Disruption, _limits: Limits = PAGE) -> Sheet:
    about = "which tokens a right answer needs, by every attribution method"
    return Sheet("disrupt and recover", about, list(_sections(study)), run=run_of(study))


def disruption_markdown(study: Disruption) -> str:
    """Write the study's table as Markdown."""
    return "\n".join(
        f"{section.note}\n\n{table.markdown()}\n"
        for section in _sections(study)
        for table in section.blocks
        if isinstance(table, Table)
    )


def _sections(study: Disruption) -> Iterator[Section]:
    known = study.known
    areas = {name: [item.areas[name][0] - item.areas[name][1] for item in known] for name in study.methods}
    rows = []
    for name in sorted(areas, key=lambda name: -sum(areas[name])):
        disrupt, recover = (interval([item.areas[name][i] for item in known]) for i in (0, 1))
        ahead = [a - b for a, b in zip(areas[BEST_EXACT], areas[name], strict=True)]
        missed = error(median(item.missed(name) for item in known)) if name.startswith(ADDITIVE) else ""
        ours = "–" if name == BEST_EXACT else _shown(interval(ahead))
        rows.append([name_method(name), _shown(interval(areas[name])), *_means(disrupt, recover), ours, missed])
    yield Section(
        "Disrupt and recover",
        f"{len(known)} items that the model answers, of {len(study.items)} asked; means and 95 % intervals, in percent "
        "of the answer's probability. Disrupt: its fall as the highest tokens are zeroed, the higher the better. "
        "Recover: as all but the highest are, the lower the better. Misses its sum by: the median, of what the scores "
        "of an additive method are to sum to.",
        [Table.of(Column("method", "key"), *_HEADER, rows=rows)],
    )


def name_method(method: str) -> str:
    """A method in words."""
    kind, _, options = method.partition("/")
    also = _ALIKE.get(method, "")
    if kind == "frozen":
        gate, readout = options.split("/")
        return f"{_NAMES[f'frozen/{gate}']}, {readout}{also}"
    if kind == "shared":
        weights, readout = options.split("/")
        return f"shared attention {weights}, {readout}{also}"
    return method


def _means(*found: Interval) -> list[str]:
    return [f"{one.mean:.1f}" for one in found]


def _shown(found: Interval) -> str:
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"
