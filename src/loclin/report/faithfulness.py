"""What the faithfulness study says, in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from loclin.analyses.faithfulness import summary
from loclin.analyses.faithfulness.prompts import HALVES, Half
from loclin.analyses.faithfulness.study import Faithfulness
from loclin.analyses.faithfulness.summary import Interval
from loclin.report.run import run_of
from loclin.report.sheet import PAGE, Limits, Section, Sheet, describe
from loclin.report.table import Column, Table

PAPER, BEST = "frozen/activation/logit/zero", "frozen/half/centred/zero"
"""The shares as the paper's map gives them, and as they agree best with what tokens do."""
_APART = ("removed", "replaced", "share")
_EFFECTS = ("removed", "replaced")


@describe.register
def _describe_study(study: Faithfulness, _limits: Limits = PAGE) -> Sheet:
    about = "shares against what removing tokens does to the model"
    return Sheet("faithfulness", about, list(_sections(study)), run=run_of(study))


def faithfulness_markdown(study: Faithfulness) -> str:
    """Write the study's tables as Markdown."""
    return "\n".join(
        f"### {section.title}\n\n{section.note}\n\n{table.markdown()}\n"
        for section in _sections(study)
        for table in section.blocks
        if isinstance(table, Table)
    )


def _sections(study: Faithfulness) -> Iterator[Section]:
    halves = [half for half in HALVES if any(prompt.half == half for prompt in study.prompts)]
    if "development" in halves:
        yield _correlations(study, "development", lambda name: name.startswith("frozen/"))
    if "held-out" in halves:
        yield _correlations(study, "held-out", lambda name: name in (PAPER, BEST) or not _variant(name))
        yield _advantage(study)
        yield _deletion(study)
    yield _apart(study)
    yield _kinds(study, halves)
    if any(prompt.planes for prompt in study.prompts):
        yield _planes(study)


def _section(title: str, note: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Section:
    first, *others = header
    return Section(title, note, [Table.of(Column(first, "key"), *others, rows=rows)])


def _variant(name: str) -> bool:
    """Whether a method is there for the choice of settings only."""
    return name.startswith("frozen/") or (name.startswith("gradient/") and name.endswith("/mean"))


def _correlations(study: Faithfulness, half: Half, shown: Callable[[str], bool]) -> Section:
    columns = {
        f"{effect}{', with last' * last}": summary.correlations(study, half, effect, last)
        for last in (False, True)
        for effect in _EFFECTS
    }
    columns["by size"] = summary.correlations(study, half, "removed", False, sizes=True)
    columns["hits"] = summary.hits(study, half, "removed", False)
    n = max((found.n for found in columns["removed"].values()), default=0)
    return _section(
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


def _advantage(study: Faithfulness) -> Section:
    rows = []
    for other in study.prompts[-1].shares:
        if other != BEST and (other == PAPER or not _variant(other)):
            found = [summary.advantage(study, "held-out", effect, False, BEST, other) for effect in _EFFECTS]
            rows.append([_name(other), *map(_shown, found)])
    return _section(
        f"By how much {_name(BEST)} is ahead, prompt by prompt",
        "Its rank correlation less the other's, on the held-out half.",
        ["than", *_EFFECTS],
        rows,
    )


def _deletion(study: Faithfulness) -> Section:
    first, *others = (summary.deletion(study, test) for test in ("first", "last", "first, all"))
    heads = ("largest first", "smallest first", "largest first, last token too")
    return _section(
        "Removing tokens in the order of their shares",
        "The fall of the prediction's log-probability in nats, mean over the steps of each curve: the larger the "
        "better where the largest shares go first, the smaller the better where the smallest do.",
        ["method", *heads],
        [[_name(name), *(_shown(found.get(name)) for found in (first, *others))] for name in first],
    )


def _apart(study: Faithfulness) -> Section:
    return _section(
        "What rankings leave out",
        "The fall of the log-probability in nats when one such token goes, and its part of the sum of |share| "
        f"({_name(BEST)}).",
        ["", *_APART],
        [[group, *(_shown(parts[name]) for name in _APART)] for group, parts in summary.apart(study, BEST).items()],
    )


def _kinds(study: Faithfulness, halves: Sequence[Half]) -> Section:
    columns = [summary.kinds(study, half, "removed", False, BEST) for half in halves]
    return _section(
        "By kind of prompt",
        f"Rank correlation of {_name(BEST)} with the removal of single tokens.",
        ["kind", *(f"{half} half" for half in halves)],
        [[kind, *(_shown(column.get(kind)) for column in columns)] for kind in columns[0]],
    )


def _planes(study: Faithfulness) -> Section:
    return _section(
        "The input projected off what the map reads most",
        "Off the top k right singular vectors of all tokens' maps together (joint) or of each token's own (each; each "
        "word: attention sinks left alone). random: off random planes. moved: moved as far in random directions.",
        ["plane", "k", "input moved", "log-probability falls", "output moved"],
        [
            [plane, str(k), *(_shown(numbers[name]) for name in ("moved", "drop", "output"))]
            for (plane, k), numbers in summary.planes(study).items()
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
