"""Which families of transformers' causal language models are exact, tried on a tiny random model of each."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm.auto import tqdm

from loclin.analyses.coverage.describe import Description, describe_parts
from loclin.common.access import reason
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.errors import LoclinError, ModelError, OptionError, OutputError
from loclin.freeze import Gate
from loclin.maps.certificate import Certificate
from loclin.maps.linearized import Linearized
from loclin.models import tiny, wrap
from loclin.models.hashing import sha256
from loclin.models.quiet import quiet
from loclin.results.files import write_text
from loclin.spectral.threads import single_thread

Outcome = Literal["passed", "refused", "error"]
Status = Literal["exact", "affine", "refused", "not built", "error"]

GATES: tuple[Gate, ...] = ("activation", "up", "half")
DTYPES = ("float64", "float32")
STATUSES: tuple[Status, ...] = ("exact", "affine", "refused", "not built", "error")
NO_BIAS = 1e-12
"""A share of biases below this is none."""
_KIND = "loclin coverage"


@dataclass(frozen=True)
class Run:
    """One certificate, or what came instead of it.

    Attributes
    ----------
    dtype, gate
        How it was run; float64 with `precision="double"`.
    outcome
        `refused` by a clear error or by a certificate that failed; `error` is any other exception: a fault.
    reconstruction_error, forward_error, bit_identical, bias_share
        The certificate's, where there is one and the number is finite.
    module, reason
        What failed, and why.
    """

    dtype: str
    gate: str
    outcome: Outcome
    reconstruction_error: float | None = None
    forward_error: float | None = None
    bit_identical: bool | None = None
    bias_share: float | None = None
    module: str = ""
    reason: str = ""


@dataclass(frozen=True)
class FamilyResult:
    """What became of a family.

    Attributes
    ----------
    family
        The model type.
    class_name
        The model's class.
    parts
        What the tiny model is made of; None for one that was not built.
    runs
        Every dtype with every gate split.
    not_built
        Why there is no tiny model.
    """

    family: str
    class_name: str = ""
    parts: Description | None = None
    runs: list[Run] = field(default_factory=list)
    not_built: str = ""

    __repr__ = brief

    @property
    def status(self) -> Status:
        """One word for all runs together; the worst run decides."""
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
        """The run to show for a family that is not exact: a fault before a refusal."""
        failed = [run for run in self.runs if run.outcome != "passed"]
        return min(failed, key=lambda run: run.outcome != "error", default=None)

    @property
    def reason(self) -> str:
        """Why it is not exact; names the runs where only some of them failed."""
        shown = self.failure
        if shown is None:
            return self.not_built
        alike = [f"{run.dtype} {run.gate}" for run in self.runs if run.outcome == shown.outcome]
        return shown.reason if len(alike) == len(self.runs) else f"{', '.join(alike)}: {shown.reason}"

    def worst(self, dtype: str) -> float | None:
        """Find the largest reconstruction error in a dtype."""
        errors = (run.reconstruction_error for run in self.runs if run.dtype == dtype)
        return max((error for error in errors if error is not None), default=None)

    def forward_error(self, dtype: str) -> float | None:
        """Find how far freezing moved the forward pass in a dtype; 0 only where it is bit-identical."""
        found = [run for run in self.runs if run.dtype == dtype and run.forward_error is not None]
        return max((0.0 if run.bit_identical else run.forward_error or 0.0 for run in found), default=None)

    def has(self, gates: Sequence[str]) -> bool:
        """Whether every dtype was run with all these gate splits."""
        return {(d, g) for d in DTYPES for g in gates} <= {(run.dtype, run.gate) for run in self.runs}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; the status comes with it for those who read the file."""
        return {"family": self.family, "status": self.status} | asdict(self)

    @classmethod
    def from_dict(cls, read: dict[str, Any]) -> FamilyResult:
        """Take back what `to_dict` gave."""
        values = {name: value for name, value in read.items() if name != "status"}
        parts = None if values["parts"] is None else Description(**values["parts"])
        return cls(**{**values, "parts": parts, "runs": [Run(**run) for run in values["runs"]]})


@dataclass(frozen=True)
class Coverage:
    """What became of every family tried; made by `coverage`.

    Attributes
    ----------
    versions
        Of loclin, torch and transformers.
    code
        The hash of loclin's own source: results of other code are not gone on with.
    results
        In the order of the families' names.
    """

    versions: dict[str, str]
    code: str
    results: list[FamilyResult]

    __repr__ = brief

    @property
    def counts(self) -> dict[Status, int]:
        """How many families have each status."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    def only(self, families: Sequence[str]) -> Coverage:
        """Leave out every family but these."""
        return replace(self, results=[result for result in self.results if result.family in families])

    def to_json(self) -> str:
        """The record as JSON text; floats that are not finite do not occur."""
        record = {
            "kind": _KIND,
            "versions": self.versions,
            "code": self.code,
            "counts": self.counts,
            "results": [result.to_dict() for result in self.results],
        }
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Coverage:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            When the text is anything else.
        """
        try:
            read = json.loads(text)
            if read["kind"] != _KIND:
                raise ValueError("it is another kind of record")
            results = [FamilyResult.from_dict(result) for result in read["results"]]
            return cls(dict(read["versions"]), str(read["code"]), results)
        except (KeyError, TypeError, AttributeError) as fault:
            raise ValueError("it is another kind of record") from fault


def read(path: Path) -> Coverage | None:
    """Read an earlier run's record; None where there is no file.

    Raises
    ------
    OutputError
        When the file cannot be read or is no such record: it is left as it is.
    """
    try:
        return Coverage.from_json(path.read_text("utf-8")) if path.is_file() else None
    except OSError as fault:
        raise OutputError(f"cannot read {path}: {reason(fault, path)}") from fault
    except ValueError as fault:
        raise OutputError(
            f"{path} is no coverage record to go on with: {str(fault).splitlines()[0]}; "
            "name another file, or write over it with --fresh (fresh=True)"
        ) from fault


@in_plain_torch
def coverage(
    families: Sequence[str] | None = None,
    *,
    gates: Sequence[Gate] = GATES,
    path: Path | None = None,
    fresh: bool = False,
    progress: Progress = silent,
) -> Coverage:
    """Certify a tiny random model of each family, in float64 and float32, with each gate split.

    Parameters
    ----------
    families
        Names of model types; all that transformers has a causal language model for where None.
    gates
        How gated MLPs are split (see `loclin.linearize`).
    path
        A JSON file that gets every family as it is finished. What it holds already, from the same versions, is not
        run again, so that an interrupted run goes on where it was.
    fresh
        Run everything again, and write over the file whatever it holds.
    progress
        Told what is gone on with, or why nothing is.

    Returns
    -------
    Coverage
        The families asked for, and those that were in the file.

    Raises
    ------
    OptionError
        For an unknown family.
    OutputError
        When the file cannot be written, or holds something else.

    Notes
    -----
    Cost: a second or two for each family, in one thread; a failing family never stops the others.
    """
    wanted = _known(families)
    record = Coverage({name: version(name) for name in ("loclin", "torch", "transformers")}, _code(), [])
    earlier = read(path) if path is not None and not fresh else None
    done: dict[str, FamilyResult] = {}
    if earlier is not None and (earlier.versions, earlier.code) != (record.versions, record.code):
        progress(f"{path} was written by other versions: starting over")
    elif earlier is not None:
        done = {result.family: result for result in earlier.results}
    rest = [family for family in wanted if family not in done or not done[family].has(gates)]
    if done:
        progress(f"{len(wanted) - len(rest)} of {len(wanted)} families are done in {path}")
    with (
        single_thread(),
        tqdm(total=len(wanted), initial=len(wanted) - len(rest), unit="family", leave=False, disable=None) as bar,
    ):
        for family in rest:
            bar.set_description(family)
            done[family] = certify_family(family, gates)
            if path is not None:
                write_text(path, replace(record, results=_sorted(done)).to_json())
            bar.update()
    return replace(record, results=_sorted(done))


@in_plain_torch
def certify_family(family: str, gates: Sequence[Gate] = GATES) -> FamilyResult:
    """Build one family's tiny model and certify it in every dtype with every gate split.

    Nothing that goes wrong is raised: it is the result.
    """
    try:
        model = tiny.build(family, dtype=torch.float32)
    except ModelError as fault:
        return FamilyResult(family, not_built=str(fault))
    return FamilyResult(
        family=family,
        class_name=type(model).__name__,
        parts=describe_parts(model, tiny.prompt(model)),
        runs=[_run(family, dtype, gate) for dtype in DTYPES for gate in gates],
    )


def _run(family: str, dtype: str, gate: Gate) -> Run:
    """Certify a model of its own, so that no run can leave anything to the next."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.build(family, dtype=getattr(torch, dtype))
            precision: Literal["stock", "double"] = "double" if dtype == "float64" else "stock"
            lin = Linearized.at(wrap(model, None, name=family), tiny.prompt(model), gate=gate, precision=precision)
            certificate = lin.certify()
    except LoclinError as fault:
        return Run(dtype, gate, "refused", module=str(getattr(fault, "module", "")), reason=_line(fault))
    except Exception as fault:  # as many kinds as there are families: every one is shown
        return Run(dtype, gate, "error", reason=f"{type(fault).__name__}: {_line(fault)}{_place(fault)}")
    module, reason = _blame(certificate)
    return Run(
        dtype=dtype,
        gate=gate,
        outcome="passed" if certificate.passed else "refused",
        reconstruction_error=_finite(certificate.reconstruction_error),
        forward_error=_finite(certificate.forward_error),
        bit_identical=certificate.bit_identical,
        bias_share=_finite(certificate.bias_share),
        module=module,
        reason=reason,
    )


def _blame(certificate: Certificate) -> tuple[str, str]:
    """Name the module that breaks a certificate, and say how; both empty for one that passed."""
    if certificate.passed:
        return "", ""
    if certificate.culprits:
        culprit = certificate.culprits[0]
        where = [culprit.kind, *(str(getattr(culprit, name, "")) for name in ("operation", "line"))]
        others = len(certificate.culprits) - 1
        more = f", and {others} more" if others else ""
        return culprit.module, f"not linear: {', '.join(filter(None, where))}, error {culprit.error:.1e}{more}"
    beyond = [f"{c.name} error {c.value:.1e} is beyond {c.limit:.1e}" for c in certificate.checks() if not c.passed]
    return "", "; ".join(beyond)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _line(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[0] if lines else type(fault).__name__


def _place(fault: Exception) -> str:
    """Say where in loclin or transformers a fault came up: whose it is."""
    homes = [Path(__file__).parents[2], Path(inspect.getfile(transformers)).parent]
    frames = [f for f in traceback.extract_tb(fault.__traceback__) if any(Path(f[0]).is_relative_to(h) for h in homes)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _sorted(results: dict[str, FamilyResult]) -> list[FamilyResult]:
    return [results[family] for family in sorted(results)]


def _known(families: Sequence[str] | None) -> list[str]:
    """Refuse a family that there is none of, with the names that are near."""
    every = tiny.families()
    for family in families or ():
        if family not in every:
            near = difflib.get_close_matches(family.lower(), every, n=3, cutoff=0.5)
            guess = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"transformers has no causal language model of the family {family!r}{guess}")
    return list(every) if families is None else sorted(set(families))


def _code() -> str:
    """Hash loclin's source, all but what only shows results."""
    home = Path(__file__).parents[2]
    shown = [home / "report", home / "cli"]
    return sha256(*(p for p in sorted(home.rglob("*.py")) if not {p, *p.parents} & {*shown}))[:16]
