"""The faithfulness study as tables, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from loclin.analyses.faithfulness import summary
from loclin.analyses.faithfulness.prompts import HALVES, Half
from loclin.analyses.faithfulness.statistics import Interval
from loclin.analyses.faithfulness.study import Study
from loclin.report.grid import Column, Grid, show

PAPER, BEST = "frozen/activation/logit/zero", "frozen/half/centred/zero"
"""The shares as the paper's map gives them, and as they agree best with what tokens do."""
_APART = ("removed", "replaced", "share")
_EFFECTS = ("removed", "replaced")


@dataclass(frozen=True)
class _Sheet:
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_faithfulness(study: Study, console: Console) -> None:
    """Print the study's tables."""
    for sheet in _sheets(study):
        first, *others = sheet.header
        table = Grid.of(Column(first, "key"), *map(Column, others))
        for row in sheet.rows:
            table.add(*row)
        show(console, Text(sheet.title, "bold"), Text(sheet.note, "dim"), table, Text())


def faithfulness_markdown(study: Study) -> str:
    """Write the study's tables as Markdown."""
    pieces = []
    for sheet in _sheets(study):
        lines = [f"| {' | '.join(row)} |" for row in (sheet.header, ["---"] * len(sheet.header), *sheet.rows)]
        pieces.append("\n".join([f"### {sheet.title}", "", sheet.note, "", *lines, ""]))
    return "\n".join(pieces)


def _sheets(study: Study) -> Iterator[_Sheet]:
    halves = [half for half in HALVES if any(prompt.half == half for prompt in study.prompts)]
    if "development" in halves:
        yield _correlation_sheet(study, "development", lambda name: name.startswith("frozen/"))
    if "held-out" in halves:
        yield _correlation_sheet(study, "held-out", lambda name: name in (PAPER, BEST) or not _variant(name))
        yield _advantage_sheet(study)
        yield _deletion_sheet(study)
    yield _apart_sheet(study)
    yield _kind_sheet(study, halves)
    if any(prompt.planes for prompt in study.prompts):
        yield _plane_sheet(study)


def _variant(name: str) -> bool:
    """Whether a method is there for the choice of settings only."""
    return name.startswith("frozen/") or (name.startswith("gradient/") and name.endswith("/mean"))


def _correlation_sheet(study: Study, half: Half, shown: Callable[[str], bool]) -> _Sheet:
    columns = {
        f"{effect}{', with last' * last}": summary.correlations(study, half, effect, last)
        for last in (False, True)
        for effect in _EFFECTS
    }
    columns["by size"] = summary.correlations(study, half, "removed", False, sizes=True)
    columns["hits"] = summary.hits(study, half, "removed", False)
    n = max((found.n for found in columns["removed"].values()), default=0)
    return _Sheet(
        f"Rank correlation of shares with what single tokens do: {half} half",
        f"Spearman's, mean over {n} prompts and its 95 % interval; sinks are left out. By size: of |share|, against "
        "removal. Hits: how often the largest share is the token whose removal costs most.",
        ["method", *columns],
        [
            [_name(name), *(_shown(found.get(name)) for found in columns.values())]
            for name in columns["removed"]
            if shown(name)
        ],
    )


def _advantage_sheet(study: Study) -> _Sheet:
    others = [name for name in study.prompts[-1].shares if name != BEST and (name == PAPER or not _variant(name))]
    rows = []
    for other in others:
        found = [summary.advantage(study, "held-out", effect, False, BEST, other) for effect in _EFFECTS]
        rows.append([_name(other), *map(_shown, found)])
    return _Sheet(
        f"By how much {_name(BEST)} is ahead, prompt by prompt",
        "Its rank correlation less the other's, on the held-out half.",
        ["than", *_EFFECTS],
        rows,
    )


def _deletion_sheet(study: Study) -> _Sheet:
    tests = {test: summary.deletion(study, test) for test in ("first", "last", "first, all")}
    heads = ("largest first", "smallest first", "largest first, last token too")
    return _Sheet(
        "Removing tokens in the order of their shares",
        "The fall of the prediction's log-probability in nats, mean over the steps of each curve: the larger the "
        "better where the largest shares go first, the smaller the better where the smallest do.",
        ["method", *heads],
        [[_name(name), *(_shown(found.get(name)) for found in tests.values())] for name in tests["first"]],
    )


def _apart_sheet(study: Study) -> _Sheet:
    return _Sheet(
        "What rankings leave out",
        "The fall of the log-probability in nats when one such token goes, and its part of the sum of |share| "
        f"({_name(BEST)}).",
        ["", *_APART],
        [[group, *(_shown(parts[name]) for name in _APART)] for group, parts in summary.apart(study, BEST).items()],
    )


def _kind_sheet(study: Study, halves: Sequence[Half]) -> _Sheet:
    columns = [summary.kinds(study, half, "removed", False, BEST) for half in halves]
    return _Sheet(
        "By kind of prompt",
        f"Rank correlation of {_name(BEST)} with the removal of single tokens.",
        ["kind", *(f"{half} half" for half in halves)],
        [[kind, *(_shown(column.get(kind)) for column in columns)] for kind in columns[0]],
    )


def _plane_sheet(study: Study) -> _Sheet:
    found: Mapping[tuple[str, int], Mapping[str, Interval]] = summary.planes(study)
    return _Sheet(
        "The input projected off what the map reads most",
        "Off the top k right singular vectors of all tokens' maps together (joint) or of each token's own (each; each "
        "word: attention sinks left alone). random: off random planes. moved: moved as far in random directions.",
        ["plane", "k", "input moved", "log-probability falls", "output moved"],
        [
            [plane, str(k), *(_shown(numbers[name]) for name in ("moved", "drop", "output"))]
            for (plane, k), numbers in found.items()
        ],
    )


def _name(method: str) -> str:
    """A method in words."""
    kind, *options = method.split("/")
    if kind == "frozen":
        gate, objective, baseline = options
        return f"frozen map, {gate}, {objective}{', less mean' * (baseline == 'mean')}"
    if kind == "gradient":
        objective, baseline = options
        return f"gradient × input, {objective}{', less mean' * (baseline == 'mean')}"
    return "integrated gradients" if kind == "integrated" else method


def _shown(found: Interval | None) -> str:
    return "–" if found is None or not found.n else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"
