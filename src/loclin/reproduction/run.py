"""`reproduce`: the paper's figures and tables of one model, in one folder, resumed where it was interrupted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from loclin.analyses.estimate import Estimate, estimate
from loclin.common.arguments import text
from loclin.common.free_memory import available
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.surroundings import in_plain_torch
from loclin.errors import BudgetError, LoclinError, ModelError
from loclin.freeze import Gate, Precision
from loclin.models import Model, load
from loclin.models.hashing import sha256, source_hash
from loclin.reproduction.folder import Folder
from loclin.reproduction.golden import PaperModel, find_alike, read_golden
from loclin.reproduction.page import page
from loclin.reproduction.result import Reproduction, Target
from loclin.reproduction.sources import Sources
from loclin.reproduction.targets import TARGETS, find_targets
from loclin.results.files import write_text
from loclin.results.provenance import Provenance, versions
from loclin.steering.match import fingerprint

_TOKENS, _BYTES = 8, 3
"""The length of the paper's prompt, with a beginning token; and at least how many bytes a token of another one has."""
_LAYERS_TIMES, _STEERING_TIMES = 3.5, 4.0
"""About how many times the time of `explain` the layers take, and the rows of the steering table; rehearsing them would
take as long as they do on small models."""
_NO_FONT = "No installed font has"
_INTERPRETER = 400_000_000
"""Bytes that the interpreter and its libraries take."""


@in_plain_torch
@with_progress
def reproduce(
    model: str | Path | Model,
    out: str | os.PathLike[str],
    targets: Sequence[str] | None = None,
    *,
    prompt: str | None = None,
    as_published: bool = False,
    gate: Gate = "activation",
    precision: Precision = "auto",
    bos: bool | None = None,
    memory: int | float | str | None = None,
    fresh: bool = False,
    progress: Progress = True,
    **loading: Any,
) -> Reproduction:
    """Make the paper's figures and tables of a model, and compare them with the published figures.

    The folder gets each target's files, `results.json` and one page, `index.html`, with all of it. Analyses are shared
    by targets and kept in the folder, so that the same call goes on where another was interrupted, and only makes what
    is missing.

    Parameters
    ----------
    model: what `loclin.load` takes, or a model that is loaded.
    out: the folder; made if it is not there. One of another model, other options or another version is refused.
    targets: some of "fig2" to "fig6", "figA1", "table1" to "table7" and "steering", which is Table 4. None: all.
    prompt: another prompt than the paper's, with which nothing is compared.
    as_published: make what the published code gets wrong, too, beside what is right: rows ranked by the norms of
        columns, lists of nearest tokens that are merged wrongly, tables without the last layer, and steering at the
        layer that the paper prints.
    gate, precision, bos, memory: as in `loclin.linearize`.
    fresh: start over in a folder that holds another run: what that has written is removed.
    progress: as in `loclin.explain`; a function is also told what the run will need, and each target as it is done.
    loading: further options of `loclin.load`.

    Raises
    ------
    OptionError: for a target that there is not.
    OutputError: for a folder that cannot be written, is in use, or holds something else.
    ModelError: where the model cannot be had; for one of the paper's, with what to do.
    BudgetError: where there is too little memory, with what would fit.
    MissingExtraError: without matplotlib (`pip install "loclin[figures]"`).

    Cost: `loclin.explain`, `loclin.explain_layers`, three dense maps for Figure 2, and up to three steered texts.
    """
    names, tell = find_targets(targets), steps(progress)
    if prompt is not None:
        text("the prompt", prompt)
    _require_matplotlib()
    freezing: dict[str, Any] = {"gate": gate, "precision": precision, "bos": bos, "memory": memory}
    given = model.info.name if isinstance(model, Model) else str(model)
    asked = {
        "model": given,
        **{name: None if value is None else str(value) for name, value in sorted(loading.items())},
        **{name: value for name, value in freezing.items() if name != "memory"},
        "prompt": prompt,
        "versions": versions(),
        "code": source_hash("cli"),
        "figures": read_golden().version,
    }
    place = Path(out)
    with Folder.opened(place, asked, fresh=fresh) as folder:
        missing = [name for name in names if folder.finished(name, _repeats(name, as_published)) is None]
        unknown = None
        if missing and not isinstance(model, Model):
            length = _TOKENS if prompt is None else max(_TOKENS, len(prompt.encode()) // _BYTES)
            unknown = _plan(given, missing, length, gate, memory, loading, tell)
        loaded = model if isinstance(model, Model) else _load(model, loading, tell)
        if unknown is not None:
            tell(f"[plan] no estimate: {unknown}")
        folder.match({"info": loaded.info.to_dict(), "numbers": fingerprint(loaded.hf)})
        sources = Sources(loaded, folder, prompt=prompt, freezing=freezing, tell=tell)
        made = [
            _make(name, sources, _repeats(name, as_published), f"[{i + 1}/{len(names)}] {name}", tell)
            for i, name in enumerate(names)
        ]
        found = _gather(sources, made, place, prompt, as_published)
        write_text(place / "results.json", found.to_json())
        write_text(place / "index.html", page(found))
    return found


def _repeats(name: str, as_published: bool) -> bool:
    return as_published and TARGETS[name].mistakes


def _require_matplotlib() -> None:
    from loclin import figures

    figures.Drawing  # noqa: B018 (its own error says what to install)


def _make(name: str, sources: Sources, as_published: bool, label: str, tell: Callable[[str], None]) -> Target:
    """Make a target, or take it from the folder."""
    done = sources.folder.finished(name, as_published)
    if done is not None:
        tell(f"{label}: done before")
        return done
    about = TARGETS[name]
    tell(f"{label}: {about.about}")
    start = time.perf_counter()
    made = about.make(sources, name, as_published)
    target = Target(
        name=name,
        about=about.about,
        files={file: sha256(sources.folder.path / file) for file in made.files},
        images=made.images,
        grids=made.grids,
        compared=made.compared,
        passed=made.passed,
        exact=made.exact,
        seconds=time.perf_counter() - start,
        as_published=as_published,
        warnings=list(dict.fromkeys(made.warnings)),
    )
    sources.folder.finish(target)
    tell(f"{label}: made in {target.seconds:.1f} s")
    return target


def _gather(sources: Sources, made: list[Target], place: Path, prompt: str | None, as_published: bool) -> Reproduction:
    """Put all targets together, with the provenance of the model at the prompt."""
    known = sources.paper_model
    warnings = _join_warnings(warning for target in made for warning in target.warnings)
    if known is not None and prompt is not None:
        warnings.append(f"Nothing is compared: the paper's figures are of its own prompts, and not of “{prompt}”.")
    elif known is None and sources.model.info.source != "hub" and (alike := find_alike(sources.model)):
        names = " or ".join(one.name for one in alike)
        warnings.append(f"It has the shape of {names}: to compare, name its directory after the one that it is.")
    elif known is not None and sources.recognised == "its shape":
        warnings.append(f"This model was taken for {known.name} by its shape alone: a fine-tune of it would differ.")
    return Reproduction(
        paper_model=None if known is None else known.name,
        recognised=sources.recognised,
        targets=made,
        provenance=_find_provenance(sources),
        settings={"as_published": as_published, "model": sources.model.info.to_dict()},
        warnings=warnings,
        folder=place,
    )


def _join_warnings(each: Iterable[str]) -> list[str]:
    """The warnings of all targets once; those about characters that no font has together."""
    warnings = list(dict.fromkeys(each))
    fonts = [one for one in warnings if one.startswith(_NO_FONT)]
    if len(fonts) > 1:
        missing = dict.fromkeys(found for one in fonts for found in re.findall(r"\S+ \(U\+[0-9A-F]+\)", one))
        joined = f"{_NO_FONT} {' '.join(missing)}{fonts[0][fonts[0].rindex(')') + 1 :]}"
        warnings = [*(one for one in warnings if one not in fonts), joined]
    return warnings


def _find_provenance(sources: Sources) -> Provenance:
    """The provenance of an analysis that was made, or else that of the map at the prompt, without a certificate."""
    for found in sources.made():
        if found.provenance is not None:
            return found.provenance
    return sources.linearize(sources.prompt).jacobian().provenance()


def _load(model: str | Path, loading: dict[str, Any], tell: Callable[[str], None]) -> Model:
    """Load the model; for one of the paper's that is not to be had, say how to get it."""
    tell(f"loading {model}")
    try:
        return load(model, **loading)
    except ModelError as fault:
        known = read_golden().find(str(model))
        if known is None or Path(model).exists():
            raise
        raise ModelError(f"{fault}; {_advise(known)}", fault.module) from fault


def _advise(known: PaperModel) -> str:
    terms = " (gated: accept its terms there, and set HF_TOKEN)" if known.gated else ""
    return (
        f"{known.name} is a model of the paper: where there is a network, 'hf download {known.ids[0]}'{terms}, and "
        "give its directory, --model DIRECTORY"
    )


def _plan(
    name: str,
    missing: list[str],
    length: int,
    gate: Gate,
    memory: int | float | str | None,
    loading: dict[str, Any],
    tell: Callable[[str], None],
) -> str | None:
    """Say what the run will need, and refuse what does not fit into memory; why not, where that is not known."""
    if any(loading.get(option) for option in ("device", "devices", "device_map", "quantization_config")):
        return "memory is planned for the processor alone"
    kinds = {TARGETS[one].kind for one in missing}
    how: dict[str, Any] = {option: loading[option] for option in ("dtype", "revision") if loading.get(option)}
    how |= {"tokens": length, "analyses": ["explain"], "gate": gate, "memory": memory, "progress": tell}
    try:
        found = estimate(name, stream=bool(loading.get("stream")), **how)
        if not found.analyses[-1].fits and loading.get("stream") is None:  # then `load` leaves layers on disk
            found = estimate(name, stream=True, **how)
    except LoclinError as fault:  # a family that cannot be planned; a model that is not there, which `load` explains
        return str(fault)
    one = found.analyses[-1]
    seconds = one.seconds * (
        ("explain" in kinds) + _LAYERS_TIMES * ("layers" in kinds) + _STEERING_TIMES * ("steering" in kinds) + 1
    )
    peak = one.peak + _INTERPRETER
    room = available(torch.device("cpu"))
    told = f"needs about {peak / 1e9:.1f} GB and {seconds / 60:.0f} min, {room / 1e9:.1f} GB are free"
    tell(f"[plan] {len(missing)} to make: {told}")
    if not one.fits:
        raise BudgetError(f"{name} {told}; what would fit: {_say_what_fits(found)}")
    return None


def _say_what_fits(found: Estimate) -> str:
    advice = found.analyses[-1].advice or "a machine with more memory"
    return f"{advice} (on the command line --dtype, --stream and --memory)"


__all__ = ["Reproduction", "reproduce"]
