"""Rules for modules whose kind says more than the operations inside; most need none, see `loclin.freeze.table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.common.sums import relative_error
from loclin.errors import NotExactError, OptionError
from loclin.freeze import quantised
from loclin.freeze.adapter import hold_adapter, is_adapted
from loclin.freeze.mode import Frozen, FrozenParts
from loclin.freeze.status import Coefficient, Live
from loclin.freeze.unary import ACTIVATIONS, secant
from loclin.models.forward import hooked
from loclin.models.four_bit import PACKING

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a form may be from the module's own output: more than rounding in the dtype, less than a wrong form."""

_SINGLE = 1e-6
"""Between the rounding of float32 and those of the half precisions."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, from which a form computes the linearised output.

    `args`, `kwargs` and `output` are the model's own values, of which coefficients can be made.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    _mode: Frozen

    __repr__ = brief

    def live(self, tensor: Tensor) -> Tensor:
        """A tensor's linearised value; for a constant, its own value in the linear path's dtype."""
        return self.coefficient(tensor) if self._mode.status(tensor) is None else self._mode.live(tensor)

    def coefficient(self, tensor: Tensor) -> Tensor:
        """A tensor's own value in the linear path's dtype, detached: a frozen coefficient."""
        return tensor.detach().to(self._mode.dtype)


Form = Callable[[ModuleCall], Tensor]
"""A module's linearised output, affine in the linearised values of its inputs."""
Matches = Callable[[nn.Module, str], bool]
"""(module, its path) -> whether the rule applies to it."""
Install = Callable[[nn.Module, str, Frozen], list[RemovableHandle]]
"""(module, its path, the mode) -> the hooks that a rule puts on the module."""


@dataclass(frozen=True)
class Rule:
    """How the modules of one kind are frozen; the first rule that matches a module is used."""

    matches: Matches
    install: Install
    linear: bool = False  # the modules are linear: the rule applies to the ordinary Jacobian too


def by_class(*names: str) -> Matches:
    """Matches modules whose class, or one of its bases, has one of these names."""
    return lambda module, _path: any(base.__name__ in names for base in type(module).__mro__)


def form_rule(matches: Matches, form: Form) -> Rule:
    """A rule that computes a module's affine form, and refuses the module if the form has another value."""

    def install(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not mode.depends((*args, *kwargs.values())):
                return
            with mode.paused():
                linear = form(ModuleCall(module, args, kwargs, output, mode))
                check_form(output, linear, path)
                mode.attach(output, Live(linear))

        return [module.register_forward_hook(replace, with_kwargs=True)]

    return Rule(matches, install)


def check_form(output: Tensor, linear: Tensor, path: str, dtype: torch.dtype | None = None) -> None:
    """Refuse a form whose value differs from the module's by more than the rounding of `dtype`, or the output's."""
    error = relative_error(linear.detach().to(output.dtype) - output, output)
    if not error <= TOLERANCE[dtype or output.dtype]:
        raise NotExactError(
            f"{path}: its affine form differs from its output by {error:.1e}, so the rule does not describe this "
            "module; correct the form",
            path,
        )


_MORE_ACTIVATIONS = ("LeakyReLU", "PReLU", "RReLU", "Hardswish")


def _activation(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
    """A module that is a function of each element: its secant slope is frozen, whatever operations are inside."""
    return _elementwise(module, mode, gates=True)


def _elementwise(module: nn.Module, mode: Frozen, gates: bool) -> list[RemovableHandle]:
    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        status = mode.status(args[0])
        if not isinstance(status, Live) or getattr(module, "inplace", False):
            return  # in place, its input is lost; the table has its operation
        with mode.paused():
            form = secant(lambda z: type(module).forward(module, z), args[0], output, mode.dtype)
            if form is not None:
                mode.attach(output, form.applied(status, mode.constant, "at_zero", active=gates or status.active))

    return [module.register_forward_hook(replace)]


def _is_activation(module: nn.Module, path: str) -> bool:
    """Whether a module is an MLP's activation; a tanh is one only if its name says so."""
    home, name = type(module).__module__, type(module).__name__
    if isinstance(module, nn.Tanh):
        return path.rpartition(".")[2].startswith(("act", "activation", "intermediate_act"))
    if home == "torch.nn.modules.activation":
        return name.lower() in ACTIVATIONS or name in _MORE_ACTIVATIONS
    return home == "transformers.activations" or name == "BloomGelu"


def _soft_cap(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
    """A module that bounds each element: live through its secant slope, and a gate only if its input is one."""
    return _elementwise(module, mode, gates=False)


def _state_space(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
    """Freeze what makes B and C: a state space multiplies them with one another and with x, which stays live."""

    def freeze(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if mode.status(output) is not None:
            mode.attach(output, Coefficient(mode.origin("frozen by a rule")))

    projection = getattr(module, "x_proj", None)
    return [] if projection is None else [projection.register_forward_hook(freeze)]


def _parts(which: FrozenParts) -> Install:
    """Freeze some of the parts where a module's own code splits a tensor."""

    def install(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
        mode.freeze_parts(module, which)
        return []

    return install


def _quantised(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
    """A quantised linear layer: its kernel runs without interception, and its dequantised weight on the linear path."""
    entered: list[bool] = []

    def enter(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        entered.append(mode.opaque)
        mode.opaque = True

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mode.opaque = entered.pop()
        if mode.opaque or not mode.depends(args):
            return
        status = mode.status(args[0])
        if not isinstance(status, Live):
            mode.attach(output, Coefficient(mode.origin("linear")))
            return
        with mode.paused():
            weight, bias = quantised.dense_weight(module), module._parameters.get("bias")
            if weight is None:
                raise NotExactError(
                    f"{path}: its quantised weight is no longer in memory when the layer has run; do not offload it",
                    path,
                )
            added = None if bias is None else mode.constant(bias.detach().to(mode.dtype), bias, "bias")
            linear = nn.functional.linear(status.linear, weight.to(mode.dtype), added)
            with torch.no_grad():
                recomputed = nn.functional.linear(args[0].to(mode.dtype), weight.to(mode.dtype), added)
            dtype = quantised.compute_dtype(module, output.dtype)
            _refuse_coarse_kernel(module, path, dtype, output.dtype)
            check_form(output, recomputed, path, dtype)
            mode.attach(output, status.then(linear))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _refuse_coarse_kernel(module: nn.Module, path: str, dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Refuse a quantised layer that computes in half precision inside a model in float32 or wider."""
    if not torch.finfo(model_dtype).eps < _SINGLE <= torch.finfo(dtype).eps:
        return
    hint = f"load it with bnb_4bit_compute_dtype={model_dtype}"
    if quantised.packs(module):
        hint = f"load it with loclin.load, or set {PACKING} = False on its layers before they run"
    raise NotExactError(
        f"{path} computes in {str(dtype)[6:]}, but the model is in {str(model_dtype)[6:]}: {hint}, or load it with "
        f"dtype={dtype}",
        path,
    )


def _refused(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
    """Refuse a module whose quantised weights cannot be read."""
    kind = f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if mode.depends((*args, *kwargs.values())):
            raise NotExactError(
                f"{path} ({kind}) has quantised weights, and {quantised.why_unreadable(module)}: load the model "
                f'without quantisation, or describe it with loclin.freeze.register("{type(module).__name__}", form)',
                path,
            )

    return [module.register_forward_pre_hook(refuse, with_kwargs=True, prepend=True)]


def _is_delta_net(module: nn.Module, _path: str) -> bool:
    return type(module).__name__.endswith("GatedDeltaNet")


def _is_mamba2(module: nn.Module, _path: str) -> bool:
    name = type(module).__name__
    return "Mamba2" in name or name in ("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Zamba2MambaMixer")


RULES: tuple[Rule, ...] = (
    Rule(quantised.is_quantised, _quantised, linear=True),
    Rule(quantised.is_unreadable, _refused, linear=True),
    Rule(_is_activation, _activation),
    Rule(lambda module, _path: type(module).__name__.endswith("Softcap"), _soft_cap),
    Rule(by_class("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), _state_space),
    Rule(_is_mamba2, _parts(lambda widths: (1, 2) if len(widths) == 3 and widths[1] == widths[2] else ())),
    # v stays live and q and k are frozen, as in attention
    Rule(_is_delta_net, _parts(lambda widths: (0, 1) if len(widths) == 3 and widths[0] == widths[1] else ())),
    Rule(is_adapted, hold_adapter),
)
"""loclin's own rules."""

_registered: list[Rule] = []
"""They come before loclin's own."""


@contextmanager
def rules_installed(paths: dict[nn.Module, str], mode: Frozen) -> Iterator[None]:
    """Put the rules' hooks on the modules, and take them off at the end."""

    def install() -> Iterator[RemovableHandle]:
        for module, path in paths.items():
            rule = next((rule for rule in (*_registered, *RULES) if rule.matches(module, path)), None)
            if rule is not None and (rule.linear or not mode.options.ordinary):
                yield from rule.install(module, path, mode)

    with hooked(install()):
        yield


class Registration(AbstractContextManager["Registration"]):
    """A rule of the user's own, until `remove()` or the end of a `with` block."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        _registered.insert(0, rule)

    def remove(self) -> None:
        """Remove the rule."""
        if self.rule in _registered:
            _registered.remove(self.rule)

    def __exit__(self, *_exc: object) -> None:
        self.remove()


def register(modules: type[nn.Module] | str | Callable[[nn.Module], bool], form: Form) -> Registration:
    """Register the affine form of modules of your own architecture.

    Parameters
    ----------
    modules
        A class, a class's name, or a function from a module to whether it is one of them.
    form
        A function from a call (see `ModuleCall`) to the module's output as an affine function of its inputs: built from
        `call.live(x)`, the linearised values of inputs, and from frozen coefficients that are made of `call.args`,
        `call.output` and the module's weights. Its value is compared with the module's own output at each call.

    Returns
    -------
    Registration
        The rule, which applies until its `remove()` or the end of its `with` block.

    Raises
    ------
    OptionError
        For anything else.
    """
    if not (isinstance(modules, str) or callable(modules)) or not callable(form):
        raise OptionError(
            "register takes (modules, form): give a class, a class's name or a function, and a function that returns "
            "the form"
        )
    if isinstance(modules, str):
        return Registration(form_rule(by_class(modules), form))
    kind = modules
    is_one = (lambda module: isinstance(module, kind)) if isinstance(kind, type) else kind
    return Registration(form_rule(lambda module, _path: is_one(module), form))
