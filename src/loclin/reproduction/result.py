"""What a reproduction found: targets, their files, and comparisons with the published figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loclin.common.brief import brief
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.serialise import NOT_SAVED
from loclin.results.table import make_columns

Verdict = Literal["agree", "differ", "not comparable"]
VERDICTS: tuple[Verdict, ...] = ("agree", "differ", "not comparable")


@dataclass(frozen=True)
class Compared:
    """A published figure beside ours."""

    target: str
    what: str
    prompt: str
    published: str
    ours: str
    verdict: Verdict
    tolerance: str  # by which it is decided; why it is not comparable
    trust: str
    source: str

    __repr__ = brief


@dataclass(frozen=True)
class Grid:
    """A table of words: in each cell words, with the number of the highlight that each has, -1 for none."""

    caption: str
    head: list[str]
    rows: list[list[list[tuple[str, int]]]]
    legend: list[str] = field(default_factory=list)
    as_published: bool = False  # with the published code's mistakes in it

    __repr__ = brief


@dataclass(frozen=True)
class Target:
    """One figure or table of the paper, made.

    Attributes
    ----------
    name, about: which one, and what it shows.
    files: what was written in the folder, with each file's SHA-256.
    images: those of the files that a page shows, and a caption for each.
    grids: tables of words.
    compared: published figures beside ours.
    passed: whether every map in it has passed its certificate; `exact`: in words.
    seconds: how long it took, the analyses that it shares with other targets aside.
    as_published: whether the published code's mistakes were asked for.
    """

    name: str
    about: str
    files: dict[str, str]
    images: dict[str, str]
    grids: list[Grid]
    compared: list[Compared]
    passed: bool
    exact: str
    seconds: float
    as_published: bool
    warnings: list[str]

    __repr__ = brief


@dataclass(frozen=True)
class Reproduction(Result):
    """The paper's figures and tables of one model; made by `reproduce`.

    Attributes
    ----------
    paper_model: which of the paper's models this one is; None for another. `recognised`: by what.
    targets: what was made.
    predictions: the model's most probable next tokens after the prompt.
    provenance: model, prompt and versions, and the certificate of the map.
    settings: the options.
    folder: where the files are; None in a result that was loaded.
    """

    paper_model: str | None
    recognised: str
    targets: list[Target]
    provenance: Provenance
    settings: dict[str, Any]
    warnings: list[str]
    folder: Path | None = field(default=None, repr=False, compare=False, metadata=NOT_SAVED)

    derived = ("counts", "passed")

    @property
    def compared(self) -> list[Compared]:
        """All comparisons with published figures."""
        return [row for target in self.targets for row in target.compared]

    @property
    def counts(self) -> dict[str, int]:
        """How many published figures agree, differ, and cannot be compared."""
        found = Counter(row.verdict for row in self.compared)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def passed(self) -> bool:
        """Whether every certificate passed, and no published figure differs."""
        return all(target.passed for target in self.targets) and not self.counts["differ"]

    def table(self) -> dict[str, list[Any]]:
        """One row per published figure: target, what, prompt, published, ours, verdict, tolerance, trust, source."""
        names = "target what prompt published ours verdict tolerance trust source"
        return make_columns(names, (tuple(getattr(row, name) for name in names.split()) for row in self.compared))
