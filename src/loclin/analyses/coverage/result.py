"""What a run of every family found: runs, families, and all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from loclin.analyses.coverage.describe import Description
from loclin.common.brief import brief
from loclin.freeze import Gate
from loclin.models.task import Task
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns

Outcome = Literal["passed", "refused", "error"]
Status = Literal["exact", "affine", "refused", "not built", "error"]

GATES: tuple[Gate, ...] = get_args(Gate)
DTYPES = ("float64", "float32")
STATUSES: tuple[Status, ...] = get_args(Status)
NO_BIAS = 1e-12
"""Up to this |b| / |y| a model counts as linear, without biases."""


@dataclass(frozen=True)
class Run:
    """One certificate, or the failure that stopped it; numbers are None without one, or if they are not finite."""

    dtype: str  # float64 runs with `precision="double"`
    gate: str
    outcome: Outcome  # refused: by a LoclinError or a failed certificate; error: any other exception, which is a bug
    reconstruction_error: float | None = None
    forward_error: float | None = None
    bit_identical: bool | None = None
    bias_share: float | None = None
    module: str = ""  # which failed
    reason: str = ""


@dataclass(frozen=True)
class FamilyResult:
    """All runs of one family: one for every dtype and gate split of its tiny model."""

    family: str  # the model type
    class_name: str = ""
    parts: Description | None = None  # None where it could not be built
    runs: list[Run] = field(default_factory=list)
    not_built: str = ""  # why not

    derived = ("status",)
    __repr__ = brief

    @property
    def status(self) -> Status:
        """The status of the worst run."""
        outcomes = {run.outcome for run in self.runs}
        if not outcomes:
            return "not built"
        if "error" in outcomes:
            return "error"
        if "refused" in outcomes:
            return "refused"
        return "exact" if (self.bias_share or 0.0) < NO_BIAS else "affine"

    @property
    def passed(self) -> int:
        """How many runs passed."""
        return sum(run.outcome == "passed" for run in self.runs)

    @property
    def bias_share(self) -> float | None:
        """The largest |b| / |y|."""
        return max((run.bias_share for run in self.runs if run.bias_share is not None), default=None)

    @property
    def failure(self) -> Run | None:
        """The run to show for a family that is not exact: an error before a refusal."""
        failed = [run for run in self.runs if run.outcome != "passed"]
        return min(failed, key=lambda run: run.outcome != "error", default=None)

    @property
    def reason(self) -> str:
        """Why the family is not exact; names the runs if only some of them failed."""
        shown = self.failure
        if shown is None:
            return self.not_built
        alike = [f"{run.dtype} {run.gate}" for run in self.runs if run.outcome == shown.outcome]
        return shown.reason if len(alike) == len(self.runs) else f"{', '.join(alike)}: {shown.reason}"

    def worst(self, dtype: str) -> float | None:
        """Return the largest reconstruction error in a dtype."""
        errors = (run.reconstruction_error for run in self.runs if run.dtype == dtype)
        return max((error for error in errors if error is not None), default=None)

    def forward_error(self, dtype: str) -> float | None:
        """Return the largest forward error in a dtype; 0 only if the frozen pass is bit-identical to the model's."""
        found = [run for run in self.runs if run.dtype == dtype and run.forward_error is not None]
        return max((0.0 if run.bit_identical else run.forward_error or 0.0 for run in found), default=None)

    def has(self, gates: Sequence[str]) -> bool:
        """Tell whether every dtype was run with all these gate splits."""
        return {(d, g) for d in DTYPES for g in gates} <= {(run.dtype, run.gate) for run in self.runs}


@dataclass(frozen=True)
class Coverage(Result):
    """The result of every family; made by `coverage`.

    Attributes
    ----------
    versions: of loclin, torch, transformers and Python.
    code: the hash of loclin's own source code: a run by another version is not resumed.
    results: one for each family, sorted by name.
    task: what the families' models predict.
    """

    versions: dict[str, str]
    code: str
    results: list[FamilyResult]
    task: Task = "causal"
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    derived = ("counts",)

    def table(self) -> dict[str, list[Any]]:
        """One row per family: status, class, number of passed runs, largest errors, bias share, reason."""
        rows = (
            (r.family, r.status, r.class_name, r.passed, *map(r.worst, DTYPES), r.bias_share, r.reason)
            for r in self.results
        )
        errors = " ".join(f"error_{dtype}" for dtype in DTYPES)
        return make_columns(f"family status class passed {errors} bias_share reason", rows)

    @property
    def counts(self) -> dict[Status, int]:
        """How many families have each status."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    def only(self, families: Sequence[str]) -> Coverage:
        """Keep these families only."""
        return replace(self, results=[result for result in self.results if result.family in families])
