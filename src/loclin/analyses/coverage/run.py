"""Which families of models in transformers are exact, by task: a certificate of a tiny random model of each."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from loclin.analyses.coverage.describe import describe_parts
from loclin.analyses.coverage.result import DTYPES, GATES, Coverage, FamilyResult, Outcome, Run
from loclin.common.progress import Progress, bar, steps, with_progress
from loclin.common.surroundings import in_plain_torch
from loclin.errors import LoclinError, ModelError, OptionError, first_line
from loclin.freeze import Gate
from loclin.maps.certificate import Certificate
from loclin.maps.linearized import Linearized
from loclin.models import tiny, wrap
from loclin.models.hashing import source_hash
from loclin.models.quiet import quiet
from loclin.models.task import Task
from loclin.results.provenance import versions
from loclin.results.result import Record
from loclin.spectral.threads import single_thread


@in_plain_torch
@with_progress
def coverage(
    families: Sequence[str] | None = None,
    *,
    task: Task = "causal",
    gates: Sequence[Gate] = GATES,
    path: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    progress: Progress = True,
) -> Coverage:
    """Certify a tiny random model of each family, in float64 and float32, with each gate split.

    The result has the requested families, and those that were in the file.

    Cost: one or two seconds for each family, in one thread. A family that fails does not stop the others.

    Raises OptionError for an unknown family; OutputError when the file cannot be written, or holds something else.

    Parameters
    ----------
    families: names of model types; None: every model type of which transformers has a model of the task.
    task: "causal", "masked", "classification" or "seq2seq": what the models predict.
    gates: how gated MLPs are split (see `loclin.linearize`).
    path: a JSON file to which each family is written as soon as it is finished. Families that the file already has,
        from the same versions, are not run again: an interrupted run is resumed.
    fresh: run everything again, and overwrite the file.
    progress: True: bars on a terminal; False: nothing; a function is told what is resumed, or why nothing is.
    """
    wanted = _check_families(families, task)
    code = source_hash("figures", "report", "reproduction", "cli")  # they only show results
    found, tell = Coverage(versions(), code, [], task), steps(progress)
    record = Record(path, Coverage, fresh)
    earlier = record.resume(found, ("versions", "code", "task"), tell, "by other versions, or for another task")
    done = {} if earlier is None else {result.family: result for result in earlier.results}
    rest = [family for family in wanted if family not in done or not done[family].has(gates)]
    if done:
        tell(f"{len(wanted) - len(rest)} of {len(wanted)} families are done in {path}")
    started = len(wanted) - len(rest)
    with single_thread(), bar(total=len(wanted), initial=started, unit="family") as progress_bar:
        for family in rest:
            progress_bar.set_description(family)
            done[family] = certify_family(family, gates, task)
            record.write(replace(found, results=[done[name] for name in sorted(done)]))
            progress_bar.update()
    return replace(found, results=[done[name] for name in sorted(done)])


@in_plain_torch
def certify_family(family: str, gates: Sequence[Gate] = GATES, task: Task = "causal") -> FamilyResult:
    """Certify the tiny model of one family in every dtype with every gate split. Failures are part of the result."""
    try:
        model = tiny.build(family, task=task, dtype=torch.float32)
    except ModelError as fault:
        return FamilyResult(family, not_built=str(fault))
    runs = [_certify(family, dtype, gate, task) for dtype in DTYPES for gate in gates]
    return FamilyResult(family, type(model).__name__, describe_parts(model, tiny.prompt(model)), runs)


def _certify(family: str, dtype: str, gate: Gate, task: Task) -> Run:
    """Certify a newly built model, so that no run can affect the next one."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.build(family, task=task, dtype=getattr(torch, dtype))
            precision: Literal["stock", "double"] = "double" if dtype == "float64" else "stock"
            wrapped, ids = wrap(model, None, name=family), tiny.prompt(model)
            more: dict[str, Any] = {"decoder": tiny.prompt(model, 3, seed=2)} if wrapped.task == "seq2seq" else {}
            if wrapped.has_encoder and wrapped.task == "classification":  # its classes read the last end of text
                ids = torch.cat([ids, ids.new_tensor([[model.config.eos_token_id]])], dim=1)
            lin = Linearized.at(wrapped, ids, gate=gate, precision=precision, **more)
            certificate = lin.certify()
    except LoclinError as fault:
        return Run(dtype, gate, "refused", module=str(getattr(fault, "module", "")), reason=first_line(fault))
    except Exception as fault:  # families fail in many ways: every failure is shown
        return Run(dtype, gate, "error", reason=f"{type(fault).__name__}: {first_line(fault)}{_locate(fault)}")
    numbers = (certificate.reconstruction_error, certificate.forward_error, certificate.bias_share)
    reconstruction, forward, biases = (number if math.isfinite(number) else None for number in numbers)
    outcome: Outcome = "passed" if certificate.passed else "refused"
    return Run(dtype, gate, outcome, reconstruction, forward, certificate.bit_identical, biases, *_blame(certificate))


def _blame(certificate: Certificate) -> tuple[str, str]:
    """Name the module that makes a certificate fail, and the reason; both are empty if the certificate passed."""
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


def _locate(fault: Exception) -> str:
    """Name the last line in loclin or transformers of an error's traceback: it tells whose bug it is."""
    homes = [Path(__file__).parents[2], Path(inspect.getfile(transformers)).parent]
    frames = [f for f in traceback.extract_tb(fault.__traceback__) if any(Path(f[0]).is_relative_to(h) for h in homes)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _check_families(families: Sequence[str] | None, task: Task) -> list[str]:
    """Refuse an unknown family, and suggest names that are similar."""
    every = tiny.families(task)
    for family in families or ():
        if family not in every:
            near = difflib.get_close_matches(family.lower(), every, n=3, cutoff=0.5)
            guess = f"; did you mean {' or '.join(near)}?" if near else ""
            kind = "causal language" if task == "causal" else task
            raise OptionError(f"transformers has no {kind} model of the family {family!r}{guess}")
    return list(every) if families is None else sorted(set(families))
