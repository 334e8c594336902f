"""What analyses of a model will cost, from its config alone: memory, flops, bytes read, seconds, and what to change.

An analysis is rehearsed: its own code runs on a model without weights (`loclin.common.rehearsal`). So what is counted
is what runs, in every family, and no formula can differ from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loclin.analyses.attribution.attribute import attribute
from loclin.analyses.explain import explain
from loclin.analyses.layers import explain_layers
from loclin.common.arguments import whole
from loclin.common.free_memory import available as free_memory
from loclin.common.free_memory import given_free
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.rehearsal import Cost, Rates, Rehearsal, rehearse
from loclin.common.sums import most_steps
from loclin.common.surroundings import in_plain_torch
from loclin.errors import BudgetError, ModelError, OptionError
from loclin.freeze import FreezeOptions, Gate
from loclin.maps.linearized import Linearized
from loclin.maps.plan import expected_columns
from loclin.models import tiny, wrap
from loclin.models.blueprint import build_empty, read_model_config
from loclin.models.lease import LayerOnDisk, OnDisk, attach
from loclin.models.model import Model
from loclin.network import memory as budgets
from loclin.network.anatomy import find_anatomy
from loclin.network.cost import DISK_BYTES_PER_SECOND, given_rate, memory_rate, rate
from loclin.network.need import allow
from loclin.network.sequence import Sublayers, find_sequence, known_sublayers
from loclin.results.result import Result

_STEPS, _ENOUGH = 8, 2**26
_LEAST_FREE = 2**32
"""Bytes that are taken as free where not even the weights fit, to say what the analyses need beside them."""
_ASIDE = "Memory is that of tensors: the interpreter and its libraries take about 0.4 GB more."
_AGAIN = "Shares whose sum float32 rounds too much are computed again in float64: this is not planned."


_TRIPLES, _BLOCK = 8, 16
_DEPTHS = 2, 3
"""A deeper model of equal layers is rehearsed with so many of them: most costs are linear in their number."""


def _find_triples(lin: Linearized, joint: bool) -> object:
    """Singular triples; matrix-free as many columns as are expected, since there are no numbers to certify."""
    J = lin.jacobian()
    if J.plan(_TRIPLES, joint=joint).chosen != "matrix_free":
        return J.svd(_TRIPLES, joint=joint)
    d_out, length, d_in = J.shape
    columns = expected_columns(_TRIPLES, length, joint, min(d_out, length * d_in if joint else d_in))
    basis = torch.zeros(columns // 2, length, d_in, dtype=J.dtype)
    for rows in basis.split(_BLOCK):
        rows[:] = J.rmatmat(torch.zeros(len(rows), d_out))
        J.matmat(rows)
    return basis


ANALYSES: dict[str, Callable[[Linearized], object]] = {
    "certify": lambda lin: lin.certify(),
    "dense": lambda lin: lin.jacobian().dense(),
    "svd": lambda lin: _find_triples(lin, joint=False),
    "joint-svd": lambda lin: _find_triples(lin, joint=True),
    "explain": explain,
    "layers": explain_layers,
    "attribute": attribute,
    "attribute-layer": lambda lin: attribute(lin, by="layer"),
    "attribute-head": lambda lin: attribute(lin, by="head"),
    "attribute-neuron": lambda lin: attribute(lin, by="neuron"),
    "attribute-tokenxlayer": lambda lin: attribute(lin, by="token×layer"),
}
"""What can be planned; each begins with `linearize`."""
_WHOLE = ("joint-svd", "layers", "svd")
"""Whose cost is not linear in the number of layers, or whose method depends on it: rehearsed with all layers."""
DEFAULT = ("attribute", "certify", "dense", "explain")


@dataclass(frozen=True)
class AnalysisEstimate:
    """What one analysis costs, `linearize` included. Memory is in bytes.

    Attributes
    ----------
    name: of `ANALYSES`, or `linearize`.
    trace: what `linearize` remembers: hidden states, and frozen coefficients within the budget.
    sweeps: the most that is held for a while beside everything else.
    result: what the analysis leaves, such as the dense map.
    peak: the most that is held at a time, the weights in memory included.
    read: bytes that are read from disk.
    flops: of matrix products.
    seconds: the time of everything, on a machine with the estimate's rates; for other rates, see `seconds_on`.
    cost: from which the time follows.
    fits: whether the peak is within the memory that there is.
    advice: what to change to make it fit; or why it does not run.
    """

    name: str
    trace: int
    sweeps: int
    result: int
    peak: int
    read: int
    flops: int
    seconds: float
    fits: bool
    advice: str
    cost: Cost

    def seconds_on(self, rates: Rates) -> float:
        """How long it takes on another machine; layers on disk are read while others run."""
        return max(self.cost.seconds(rates), self.read / rates.read)


@dataclass(frozen=True)
class Estimate(Result):
    """What analyses of a model cost; made by `estimate`.

    Attributes
    ----------
    model, family, dtype, tokens: what is planned.
    n_parameters, weights: how many, and their bytes in memory (with `stream` without the layers on disk).
    stored: the bytes of all weights.
    stream: whether the layers stay on disk.
    available, budget: the memory of the machine, and what may be used of it beside weights and results.
    rates: what the machine does in a second.
    analyses: the cost of each.
    warnings: what the estimate does not know.
    """

    model: str
    family: str
    dtype: str
    tokens: int
    n_parameters: int
    weights: int
    stored: int
    stream: bool
    available: int
    budget: int
    rates: Rates
    analyses: list[AnalysisEstimate]
    warnings: list[str]

    def table(self) -> dict[str, list[Any]]:
        """One row per analysis."""
        names = ["name", "trace", "sweeps", "result", "peak", "read", "flops", "seconds", "fits", "advice"]
        return {name: [getattr(one, name) for one in self.analyses] for name in names}


@in_plain_torch
@with_progress
def estimate(
    model: str | Path,
    *,
    tokens: int,
    analyses: Sequence[str] = DEFAULT,
    config_file: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    gate: Gate = "activation",
    memory: int | float | str | None = None,
    available: int | str | None = None,
    stream: bool = False,
    rate_flops: float | None = None,
    rate_memory: float | None = None,
    rate_read: float | None = None,
    progress: Progress = True,
) -> Estimate:
    """Estimate what analyses of a model cost, from its config alone; no weight is read.

    Flops are those of the run, but where numbers decide: how soon a spectrum is certified, and whether shares are
    summed again in float64. Memory is that of tensors on a CPU, the interpreter's own (0.4 GB) aside.

    Parameters
    ----------
    model, revision, dtype, stream: as in `loclin.load`.
    tokens: the length of the prompt, T.
    analyses: names of `loclin.analyses.estimate.ANALYSES`.
    config_file: the model's `config.json`, instead of the model; the name is then only a name.
    gate, memory: as in `loclin.linearize`.
    available: the memory of the machine, in bytes or such as "24GB"; None: what is free here.
    rate_flops, rate_memory, rate_read: what the machine does in a second (see `Rates`). None: measured here, and 2 GB
        read.
    progress: as in `loclin.explain`.

    Raises
    ------
    ModelError: where the config cannot be read, or is that of no causal decoder.
    OptionError: for an unknown analysis, fewer than one token, or more than the model has positions.

    Cost: the Python of each analysis: seconds, or a minute for a dense map of many layers at many tokens.
    """
    length, tell = whole("tokens", tokens, 1), steps(progress)
    for name in analyses:
        if name not in ANALYSES:
            raise OptionError(f"analysis {name!r}: choose one of {', '.join(ANALYSES)}")
    label = str(model)
    tell(f"reading the config of {label}")
    config = read_model_config(label, None if config_file is None else Path(config_file), revision)
    hf = build_empty(config, label, dtype)
    machine = _rates(hf.dtype, rate_flops, rate_memory, rate_read)
    room = free_memory(torch.device("cpu")) if available is None else int(budgets.parse_memory(available))
    sublayers, weights = _find_sublayers(hf), [*hf.parameters(), *hf.buffers()]
    stored = sum(weight.nbytes for weight in weights)
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in find_anatomy(hf).layers]
    streamed = stored - sum(layers) + 2 * max(layers)
    held, reader = (streamed, _LayerReader(hf, max(layers))) if stream else (stored, None)
    with _on(machine, max(room - held, _LEAST_FREE), sublayers), rehearse(weights) as rehearsal:
        empty = wrap(hf, None, name=label)
        if empty.context_length is not None and length > empty.context_length:
            raise OptionError(f"tokens={length}: {label} has {empty.context_length} positions; give at most so many")
        allowed = budgets.budget(memory, torch.device("cpu"))
        prompt = _Prompt(empty, length, FreezeOptions(gate), memory, held, room, reader)
        planned: list[AnalysisEstimate] = []
        for name in dict.fromkeys(analyses or ("linearize",)):
            tell(f"rehearsing {name}")
            planned += prompt.estimate(name, rehearsal, machine)[bool(planned) :]
    found = Estimate(
        model=label,
        family=empty.info.family,
        dtype=empty.info.dtype,
        tokens=length,
        n_parameters=empty.info.n_parameters,
        weights=held,
        stored=stored,
        stream=stream,
        available=room,
        budget=allowed,
        rates=machine,
        analyses=planned,
        warnings=[_ASIDE, *([_AGAIN] if any(one.name.startswith("attribute") for one in planned) else [])],
    )
    return replace(found, analyses=[_advise(one, found, hf.dtype, streamed) for one in planned])


class _LayerReader:
    """Leaves the weights of a model's layers on a disk that there is not, and counts what is read of them."""

    def __init__(self, hf: PreTrainedModel, layer_bytes: int) -> None:
        layers = find_anatomy(hf).layers
        self._weights = [dict(layer.named_parameters()) for layer in layers]
        self.layer_bytes, self.read = layer_bytes, 0
        for index, layer in enumerate(layers):
            places = {name: OnDisk(weight.detach(), False) for name, weight in self._weights[index].items()}
            attach(layer, LayerOnDisk(self, index, places))

    def get(self, layer: int, names: Collection[str]) -> dict[str, Tensor]:
        """The named parameters of a layer."""
        found = {name: self._weights[layer][name].detach() for name in names}
        self.read += sum(weight.nbytes for weight in found.values())
        return found


@dataclass(frozen=True)
class _Prompt:
    """What is rehearsed: a model at so many tokens, within a budget."""

    model: Model
    length: int
    options: FreezeOptions
    budget: budgets.Budget
    held: int
    room: int
    reader: _LayerReader | None

    def estimate(self, name: str, rehearsal: Rehearsal, rates: Rates) -> list[AnalysisEstimate]:
        """Rehearse `linearize` and an analysis, with fewer layers if what they cost is linear in them."""
        layers, why, least = list(find_anatomy(self.model.hf).layers), "", None
        is_uniform = len({tuple(w.shape for w in layer.parameters()) for layer in layers}) == 1
        try:
            if not is_uniform or len(layers) <= _DEPTHS[1] or name in _WHOLE:
                runs = self._run(name, rehearsal)
            else:
                few, more = (self._with_layers(depth, name, rehearsal) for depth in _DEPTHS)
                ratio = (len(layers) - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
                runs = [
                    (a[0].towards(b[0], ratio), a[1] + ratio * (b[1] - a[1])) for a, b in zip(few, more, strict=True)
                ]
                allowed = allow(self.model, self.length, self.options, self.budget)
                if runs[0][0].kept > allowed.coefficients:  # not all of them may be kept: that is not linear
                    runs = self._run(name, rehearsal)
        except BudgetError as fault:  # it would be refused in the same way when it runs
            runs, why, least = [(Cost(), 0.0)] * 2, str(fault), fault.least
        if least is not None:
            return self._with_more(name, rehearsal, rates, least)
        (traced, first), (found, second) = runs
        made = [self._describe("linearize", traced, Cost(), first, rates, why)]
        return made if name == "linearize" else [*made, self._describe(name, traced, found, first + second, rates, why)]

    def _with_more(self, name: str, rehearsal: Rehearsal, rates: Rates, least: int) -> list[AnalysisEstimate]:
        """The estimate with a budget in which there is room: in the least that works, columns go one by one."""
        enough = max(2 * least, _ENOUGH)
        made = replace(self, budget=enough).estimate(name, rehearsal, rates)
        advice = f"memory={enough}, or {least} at least"
        try:
            allow(self.model, self.length, self.options, self.budget)
        except BudgetError:  # `linearize` is refused, too
            return [replace(one, fits=False, advice=advice) for one in made]
        return [*made[:-1], replace(made[-1], fits=False, advice=advice)]

    def _describe(self, name: str, traced: Cost, found: Cost, read: float, rates: Rates, why: str) -> AnalysisEstimate:
        both = traced.then(found)
        sweeps, peak = max(traced.peak - traced.kept, found.peak - found.kept), self.held + both.peak
        made = AnalysisEstimate(
            name=name,
            trace=round(traced.kept),
            sweeps=round(sweeps),
            result=round(found.kept),
            peak=round(peak),
            read=round(read),
            flops=round(both.flops),
            seconds=0.0,
            fits=peak <= self.room and not why,
            advice=why,
            cost=both,
        )
        return replace(made, seconds=made.seconds_on(rates))

    def _run(self, name: str, rehearsal: Rehearsal) -> list[tuple[Cost, float]]:
        """The cost of `linearize` and of an analysis, and the bytes that each reads."""
        made: list[Linearized] = []

        def linearize() -> None:
            ids = torch.ones(1, self.length, dtype=torch.long)
            made.append(Linearized.at(self.model, ids, gate=self.options.gate, memory=self.budget))

        costs = []
        for work in (linearize, lambda: None if name == "linearize" else ANALYSES[name](made[0])):
            before = 0 if self.reader is None else self.reader.read
            cost = rehearsal.cost(work)
            costs.append((cost, 0.0 if self.reader is None else float(self.reader.read - before)))
        return costs

    def _with_layers(self, depth: int, name: str, rehearsal: Rehearsal) -> list[tuple[Cost, float]]:
        """The same for the model's first layers alone."""
        hf = self.model.hf
        layers = list(find_anatomy(hf).layers)
        holder = next(one for one in hf.modules() if isinstance(one, nn.ModuleList) and list(one) == layers)
        whole_list = holder._modules
        try:
            holder._modules = dict(list(whole_list.items())[:depth])
            return self._run(name, rehearsal)
        finally:
            holder._modules = whole_list


def _find_sublayers(hf: PreTrainedModel) -> Sublayers:
    """How a family's blocks are built, by a forward pass of its tiny model; ModelError where that is one block."""
    small = wrap(tiny.build(hf.config.get_text_config().model_type))
    sequence = find_sequence(small, find_anatomy(small.hf), tiny.prompt(small.hf))
    if sequence.fallback_reason is not None:
        raise ModelError(f"{small.info.family} cannot be planned: it is taken as one block, {sequence.fallback_reason}")
    return sequence.blocks[0].sublayers


@contextmanager
def _on(machine: Rates, free: int, sublayers: Sublayers) -> Iterator[None]:
    """Let what is planned inside know the machine's speed, its free memory, and how blocks are built."""
    given: dict[ContextVar[Any], object] = {
        given_rate: machine.flops,
        given_free: free,
        known_sublayers: sublayers,
        most_steps: _STEPS,
    }
    tokens = {variable: variable.set(value) for variable, value in given.items()}
    try:
        yield
    finally:
        for variable, token in tokens.items():
            variable.reset(token)


def _rates(dtype: torch.dtype, flops: float | None, memory: float | None, read: float | None) -> Rates:
    """The rates that are given; what is not is measured here, for the dtype of the sweeps."""
    return Rates(
        flops=rate(torch.device("cpu"), FreezeOptions().dtype(dtype)) if flops is None else flops,
        memory=memory_rate() if memory is None else memory,
        read=DISK_BYTES_PER_SECOND if read is None else read,
    )


def _advise(one: AnalysisEstimate, found: Estimate, dtype: torch.dtype, streamed: int) -> AnalysisEstimate:
    """What to change for an analysis that does not fit; `streamed` bytes of weights are in memory with `stream`."""
    if one.fits or one.advice:
        return one
    held, room = found.weights, found.available
    beside, advice = one.peak - held, []
    if dtype.itemsize > 2 and held // 2 + beside <= room:
        advice.append("dtype=bfloat16")
    if not found.stream and streamed + beside <= room:
        advice.append(f"stream=True ({streamed / 1e9:.1f} GB of weights in memory)")
    if one.sweeps > found.budget // 2 and held + one.trace + one.result < room:
        advice.append("a smaller memory=")
    if one.result > room // 4:
        advice.append("svd(joint=True) or products instead of the dense map, or the map in a file: dense(path=)")
    if held + one.trace // found.tokens < room and one.trace > room // 4:
        advice.append("fewer tokens")
    return replace(one, advice="; ".join(advice) or "a machine with more memory")
