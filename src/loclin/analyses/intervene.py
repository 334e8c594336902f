"""Interventions: what a target becomes without a component, as the frozen map says and as the model says.

A component's output c is replaced by c' at some positions. Under the freeze the target changes by exactly g . (c' - c),
with the target's gradient g at the component, through all later layers. The model itself is run with c' in the place of
c, and all that is frozen otherwise (attention, norms, gates) changes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.analyses.attribution.readout import Readout, read_target
from loclin.analyses.attribution.shares import pull_down
from loclin.analyses.attribution.target import Direction, Target
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.surroundings import eager_code, exact_arithmetic
from loclin.errors import OptionError, PromptError
from loclin.maps.linearized import Linearized, question
from loclin.models.forward import (
    at_all_tokens,
    hidden_input,
    hidden_output,
    hooked,
    logits_at,
    with_hidden_input,
    with_hidden_output,
)
from loclin.models.replica import exclusive
from loclin.network.autograd import grad
from loclin.network.points import parse_point
from loclin.network.units import OutputProjection, UnitFinder
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns

How = Literal["zero", "mean", "patch"]
_UNIT = re.compile(r"L(-?\d+)([HN])(-?\d+)")
_TOKEN = re.compile(r"T(-?\d+)")
_STREAM = ("resid_pre", "resid_post")


@dataclass(frozen=True)
class Effect:
    """One component's intervention.

    Attributes
    ----------
    name: `L3H5` for a head, `L3N7` for a neuron, `attn_out.3`, `mlp_out.3`, `T4` for a token, or a direction's point.
    frozen, model: the change of the target, as the frozen map and as the model says.
    predicted: the model's most probable next token, with its probability: with the component replaced.
    """

    name: str
    frozen: float
    model: float
    predicted: str
    probability: float

    __repr__ = brief

    @property
    def ratio(self) -> float | None:
        """What the frozen map says over what the model says; None where the model says nothing."""
        return self.frozen / self.model if self.model else None


@dataclass(frozen=True)
class Interventions(Result):
    """Components replaced one at a time; made by `loclin.intervene`.

    Attributes
    ----------
    how: what each component's output is replaced by: zero, its mean over the prompt, or its value in another prompt.
    positions: where it is replaced; empty for everywhere.
    target: as in `Attribution`.
    predicted: the model's most probable next token as it is, with its probability.
    effects: one for each component.
    """

    how: How
    positions: list[int]
    target: dict[str, Any]
    predicted: tuple[str, float]
    effects: list[Effect]
    warnings: list[str] = field(default_factory=list)
    provenance: Provenance | None = None

    def __getitem__(self, i: int) -> Effect:
        return self.effects[i]

    def __len__(self) -> int:
        return len(self.effects)

    def table(self) -> dict[str, list[Any]]:
        """One row per component: its name, both changes of the target, and what the model then predicts."""
        rows = ((e.name, e.frozen, e.model, e.ratio, e.predicted, e.probability) for e in self.effects)
        return make_columns("component frozen model ratio predicted probability", rows)


@question
@with_progress
def intervene(
    lin: Linearized,
    components: str | Direction | Sequence[str | Direction],
    how: How = "zero",
    *,
    patch: Linearized | None = None,
    target: Target = None,
    at: Sequence[int] | None = None,
    position: int = -1,
    progress: Progress = True,
) -> Interventions:
    """Replace components one at a time, and compare what the frozen map says with what the model does.

    Cost: one column backward; a graph of each layer that has a component; and a forward pass for each component.
    Memory: one layer's graph.

    Raises OptionError for a component that does not exist or cannot be told apart, a target that is not read at the
    logits or at `final`, or options that do not fit together; PromptError for prompts of different lengths, or a
    position outside the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    components: `L3H5` (a query head), `L3N7` (an MLP neuron), `attn_out.3`, `mlp_out.3`, `T4` (the embedding of the
        token at position 4), `resid_pre.3` or `resid_post.3` (the whole residual stream), or a `Direction` at one of
        these, which is projected out; or several.
    how: `"zero"`; `"mean"`: the mean of the component's output over the prompt's positions; `"patch"`: its output in
        the prompt `patch`, at the same positions. A direction's coefficient is replaced in the same way.
    patch: another prompt of the same length, from `loclin.linearize`.
    target: what is looked at, see `loclin.attribute`; a span must be in the prompt.
    at: the positions at which the component is replaced; None for all.
    position: the position at which the target is read.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    if (how == "patch") != (patch is not None):
        raise OptionError("how='patch' and patch= belong together: give the other prompt's linearization")
    if patch is not None:
        check_alike(lin, patch)
    tell, length = steps(progress), lin.trace.length
    readout = read_for_runs(lin, target, position)
    places = sorted({lin.trace.position(one) for one in at}) if at is not None else list(range(length))
    named = [components] if isinstance(components, str | Direction) else list(components)
    chosen = [parse_replaced(lin, one) for one in named]
    predicted, effects = replace_each(lin, readout, [(one, places) for one in chosen], how, patch, tell)
    return Interventions(
        how=how,
        positions=[] if at is None else places,
        target=readout.to_dict(),
        predicted=predicted,
        effects=effects,
        warnings=[*lin.warnings, *readout.warnings],
        provenance=replace(lin.jacobian(position=readout.position).provenance(), target=readout.at),
    )


def check_alike(lin: Linearized, other: Linearized) -> None:
    """Refuse to patch from a prompt of another length, or from a model of another shape."""
    if other.trace.length != lin.trace.length:
        raise PromptError(
            f"the prompts have {lin.trace.length} and {other.trace.length} tokens, and patching needs the same number: "
            "pad neither, but choose words of as many tokens"
        )
    if (other.trace.n_layers, other.trace.width) != (lin.trace.n_layers, lin.trace.width):
        raise OptionError(
            f"{lin.model.info.name} has {lin.trace.n_layers} layers of width {lin.trace.width}, "
            f"{other.model.info.name} {other.trace.n_layers} of {other.trace.width}: patch between alike ones"
        )


def read_for_runs(lin: Linearized, target: Target, position: int) -> Readout:
    """Read a target that a run of the model has, too; OptionError for another."""
    here, readout = read_target(lin, target, position)
    if here is not lin:
        raise OptionError("the target is not in the prompt: linearize the whole text, and give Span(positions=...)")
    if readout.read is None:
        raise OptionError(f"{readout.kind}: give a target at final or the logits")
    return readout


def replace_each(
    lin: Linearized,
    readout: Readout,
    replaced: Sequence[tuple[Replaced, list[int]]],
    how: How,
    patch: Linearized | None,
    tell: Callable[[str], None],
) -> tuple[tuple[str, float], list[Effect]]:
    """Replace components one at a time, each at its positions; returns also what the model predicts as it is."""
    assert readout.read is not None
    tell("what the frozen map says")
    parts = _measure(lin, readout, [one for one, _ in replaced], patch)
    plain, effects = _run(lin, readout, []), []
    for one, places in replaced:
        tell(f"what the model says without {one.name}")
        part = parts[one]
        new = part.replacement(how, places)
        change = (part.gradient.double() * (new - part.value).double()).sum().item()
        logits, final = _run(lin, readout, part.hooks(lin, new, places))
        effects.append(
            Effect(one.name, change, readout.read(logits, final) - readout.read(*plain), *_predict(lin, logits))
        )
    return _predict(lin, plain[0]), effects


@dataclass(frozen=True)
class Replaced:
    """A component as it was asked for; `layer` None for the embeddings."""

    name: str
    kind: str
    layer: int | None
    index: int = 0
    direction: Float[Tensor, " d"] | None = None

    __repr__ = brief

    def __hash__(self) -> int:
        return hash((self.name, id(self.direction)))

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class _Part:
    """A component's value, the target's gradient there, and how the model is run with another value."""

    value: Float[Tensor, "T n"]
    gradient: Float[Tensor, "T n"]
    other: Float[Tensor, "T n"] | None  # its value in the other prompt
    hooks: Callable[[Linearized, Tensor, list[int]], Iterator[RemovableHandle]]

    __repr__ = brief

    def replacement(self, how: How, places: list[int]) -> Float[Tensor, "T n"]:
        """The value with zero, its mean, or the other prompt's value at some positions."""
        new = self.value.clone()
        source = torch.zeros_like(new) if how == "zero" else self.value.mean(0).expand_as(new)
        new[places] = (source if self.other is None else self.other.to(new))[places]
        return new


def parse_replaced(lin: Linearized, component: str | Direction) -> Replaced:
    """Find out which component is meant; OptionError for one that there is not."""
    if isinstance(component, Direction):
        point = parse_point(component.at, lin.trace.n_layers)
        if point.kind not in _STREAM or point.layer is None:
            raise OptionError(f"a direction at {point}: give one at resid_pre.L or resid_post.L")
        norm = component.vector.double().norm()
        if component.vector.shape != (lin.trace.width,) or not norm > 0:
            raise OptionError(f"a direction at {point} has {lin.trace.width} numbers, not all of them zero")
        return Replaced(f"direction at {point}", point.kind, point.layer, direction=component.vector.double() / norm)
    if (token := _TOKEN.fullmatch(component)) is not None:
        at = lin.trace.position(int(token[1]))
        return Replaced(f"T{at}", "token", None, at)
    if (unit := _UNIT.fullmatch(component)) is not None:
        kind = "attn_out" if unit[2] == "H" else "mlp_out"
        layer = parse_point(f"{kind}.{unit[1]}", lin.trace.n_layers).layer
        return Replaced(f"L{layer}{unit[2]}{unit[3]}", unit[2], layer, int(unit[3]))
    if component.startswith(("attn_out.", "mlp_out.", *(f"{kind}." for kind in _STREAM))):
        point = parse_point(component, lin.trace.n_layers)
        return Replaced(str(point), point.kind, point.layer)
    raise OptionError(f"no component {component!r}: write L3H5, L3N7, attn_out.3, mlp_out.3, resid_pre.3, or T4")


def _measure(
    lin: Linearized, readout: Readout, chosen: list[Replaced], patch: Linearized | None
) -> dict[Replaced, _Part]:
    """The value of each component, and the target's gradient there, by one sweep."""
    found: dict[Replaced, _Part] = {}
    for layer, above, cotangent in pull_down(lin.chain, readout):
        here = [one for one in chosen if one.layer == layer]
        if layer is None or not here:
            continue
        opened, other = LayerParts(lin, layer), None if patch is None else LayerParts(patch, layer)
        for one in here:
            found[one] = _measure_in_layer(opened, above, cotangent, one, other)
    for one in chosen:
        if one.layer is None:
            found[one] = _measure_token(lin, cotangent, one, patch)
        elif one not in found:  # behind where the target is read
            raise OptionError(f"{one.name} is behind the target; give a component before it")
    return found


def _measure_token(lin: Linearized, cotangent: Tensor, one: Replaced, patch: Linearized | None) -> _Part:
    at, stream = one.index, _stream_hooks(replace(one, kind="resid_pre", layer=0))

    def hooks(lin: Linearized, new: Tensor, _places: list[int]) -> Iterator[RemovableHandle]:
        return stream(lin, new, [at])

    mask = torch.zeros(lin.trace.length, 1, device=cotangent.device, dtype=cotangent.dtype)
    mask[at] = 1
    other = None if patch is None else patch.embeddings
    return _Part(lin.embeddings, cotangent[0] * mask, other, hooks)


def _measure_in_layer(
    here: LayerParts, above: str, cotangent: Tensor, one: Replaced, there: LayerParts | None
) -> _Part:
    value, end, path = here.find(one)
    output, length = here.graph.points[above], here.trace.length
    pulled: Tensor | None = cotangent  # at the end of the layer, or of the MLP, which adds to it
    if one.kind not in ("mlp_out", "resid_post"):
        (pulled,) = grad(output, end, cotangent.to(output), retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(end) if pulled is None else pulled
    other = None if there is None else there.find(one)[0]
    if one.direction is not None:
        v = one.direction.to(value)
        rows = gradient.reshape(length, -1)
        return _Part(
            (value @ v)[:, None],
            (rows @ v.to(rows))[:, None],
            None if other is None else (other @ v)[:, None],
            _stream_hooks(one),
        )
    gradient = gradient.reshape(length, -1)
    if one.kind in _STREAM:
        return _Part(value, gradient, other, _stream_hooks(one))
    if one.kind in ("H", "N"):
        count = value.shape[1]
        gradient = gradient.unflatten(1, (count, -1))[:, one.index]
        value = value[:, one.index]
        other = None if other is None else other[:, one.index]
    return _Part(value, gradient, other, _unit_hooks(one, path))


class LayerParts:
    """The graph of one layer, for all components in it."""

    def __init__(self, lin: Linearized, index: int) -> None:
        self.trace, self._index = lin.trace, index
        self._finder = UnitFinder(lin.trace.layers[index].block.sublayers)
        self.graph = lin.chain.layers[index].graph(collect=lin.trace.biased[index], finder=self._finder)

    def projection(self, kind: str) -> OutputProjection | None:
        """What the heads (`attn_out`) or the neurons (`mlp_out`) enter, if they can be told apart."""
        output = self.graph.points.get(kind)
        return None if output is None else self._finder.projection(kind, output, self.graph.constants)

    def find(self, one: Replaced) -> tuple[Tensor, Tensor, str]:
        """A component's value, where it is in the graph, and the path of its module."""
        trace, points, layer, finder = self.trace, self.graph.points, self._index, self._finder
        if one.kind in _STREAM:
            return trace.value(parse_point(f"{one.kind}.{layer}", trace.n_layers)), points[one.kind], ""
        kind = {"H": "attn_out", "N": "mlp_out"}.get(one.kind, one.kind)
        path = trace.sublayer_path(layer, kind)
        if kind not in points:
            raise OptionError(
                f"{one.name}: what {kind} adds in layer {layer} cannot be told apart; give another component"
            )
        if one.kind == kind:
            return trace.value(parse_point(f"{kind}.{layer}", trace.n_layers)), points[kind], path
        found = self.projection(kind)
        if found is None:
            raise OptionError(f"{one.name}: {finder.why_no_projection(kind)}; give attn_out.{layer} or mlp_out.{layer}")
        if not -found.count <= whole("index", one.index) < found.count:
            raise OptionError(f"{one.name}: layer {layer} has {found.count} of them, 0 to {found.count - 1}")
        return found.source.detach().reshape(trace.length, found.count, -1), found.source, found.path


def _unit_hooks(one: Replaced, path: str) -> Callable[[Linearized, Tensor, list[int]], Iterator[RemovableHandle]]:
    def hooks(lin: Linearized, new: Tensor, places: list[int]) -> Iterator[RemovableHandle]:
        assert one.layer is not None
        module = lin.trace.layers[one.layer].block.module.get_submodule(path)

        def enter(_module: Any, args: tuple[Any, ...]) -> Any:
            x = args[0].clone()
            rows = x.reshape(lin.trace.length, -1)
            width = new.shape[1]
            count = rows.shape[1] // width
            start = one.index % count * width
            rows[places, start : start + width] = new[places].to(rows)
            return (rows.reshape(x.shape), *args[1:])

        def leave(_module: Any, _args: Any, output: Any) -> Any:
            hidden = hidden_output(output).clone()
            hidden.reshape(lin.trace.length, -1)[places] = new[places].to(hidden)
            return with_hidden_output(output, hidden)

        yield module.register_forward_pre_hook(enter) if one.kind in ("H", "N") else module.register_forward_hook(leave)

    return hooks


def _stream_hooks(one: Replaced) -> Callable[[Linearized, Tensor, list[int]], Iterator[RemovableHandle]]:
    def hooks(lin: Linearized, new: Tensor, places: list[int]) -> Iterator[RemovableHandle]:
        assert one.layer is not None
        block, direction = _block(lin, one), one.direction

        def moved(hidden: Tensor) -> Tensor:
            hidden, wanted = hidden.clone(), new[places].to(hidden.device)
            if direction is not None:  # only the coefficient of a direction
                here, v = hidden[0, places].double(), direction.to(hidden.device)
                wanted = here + (wanted.double() - (here @ v)[:, None]) * v
            hidden[0, places] = wanted.to(hidden)
            return hidden

        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_hidden_input(args, kwargs, moved(hidden_input(args, kwargs)))

        def leave(_module: Any, _args: Any, output: Any) -> Any:
            return with_hidden_output(output, moved(hidden_output(output)))

        if one.kind == "resid_pre":
            yield block.register_forward_pre_hook(enter, with_kwargs=True)
        else:
            yield block.register_forward_hook(leave)

    return hooks


def _block(lin: Linearized, one: Replaced) -> nn.Module:
    """The layer of a component on the stream, whose input or output is replaced."""
    if lin.trace.sequence.fallback_reason is not None:
        raise OptionError(f"{one.name}: {lin.model.info.name} has no layer whose input could be replaced")
    assert one.layer is not None
    return lin.trace.layers[one.layer].block.module


def _run(lin: Linearized, readout: Readout, hooks: Any) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n d"]]:
    """Run the model with hooks: its logits, and its final hidden states, where the target is read."""
    trace, seen, at = lin.trace, list[Tensor](), list(readout.positions)
    trace.check_weights(trace.model.hf)

    def note_final(_module: Any, _args: Any, output: Any) -> None:
        seen.append(at_all_tokens(trace.model, hidden_output(output), trace.length)[0, at])

    with exclusive(trace.model.hf), exact_arithmetic(), eager_code(), torch.no_grad():
        handles = [trace.sequence.exit.register_forward_hook(note_final)]
        with hooked(handles), hooked(hooks):
            logits = logits_at(trace.model, trace.input_ids, at)
    return logits.reshape(len(at), -1), seen[-1]


def _predict(lin: Linearized, logits: Float[Tensor, "n V"]) -> tuple[str, float]:
    probabilities = logits[-1].double().softmax(0)
    best = int(probabilities.argmax())
    return lin.model.name_outputs([best])[0], probabilities[best].item()
