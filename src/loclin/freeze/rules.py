"""Rules for whole modules, as data: where what a module is says more than the operations inside it.

Most of a model needs no rule: every torch operation is frozen by the table in `loclin.freeze.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loclin.common.brief import brief
from loclin.errors import NotExactError, OptionError
from loclin.freeze import quantised
from loclin.freeze.mode import Frozen, HeldParts
from loclin.freeze.status import Held, Live
from loclin.freeze.unary import ACTIVATIONS, secant
from loclin.models.four_bit import PACKING

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a form may be from the module's own output: rounding in the model's dtype passes, a wrong form does not."""

_SINGLE = 1e-6
"""Between the roundings of float32 and of the half precisions."""


@dataclass(frozen=True)
class Call:
    """One call of a module, as a form sees it.

    Attributes
    ----------
    module
        The module.
    args, kwargs
        What it was called with: the model's own values, to make coefficients of.
    output
        What it gave.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    _mode: Frozen

    __repr__ = brief

    def live(self, tensor: Tensor) -> Tensor:
        """A tensor's twin on the linear path; a constant's own value there."""
        return tensor.detach().to(self._mode.dtype) if self._mode.status(tensor) is None else self._mode.live(tensor)

    def held(self, tensor: Tensor) -> Tensor:
        """A tensor's own value, in the linear path's dtype: a coefficient."""
        return tensor.detach().to(self._mode.dtype)


Form = Callable[[Call], Tensor]
"""A module's output, affine in the live twins of its inputs."""
Matches = Callable[[nn.Module, str], bool]
"""(module, its path) -> whether the rule is for it."""


@dataclass(frozen=True)
class Rule:
    """How the modules of one kind are frozen; the first rule that matches a module is used.

    Attributes
    ----------
    name
        What the modules are.
    matches
        Which modules the rule is for.
    install
        (module, its path, the mode) -> the hooks it put on the module.
    linear
        Whether the modules are linear by themselves: then the rule is good for the ordinary Jacobian too.
    """

    name: str
    matches: Matches
    install: Callable[[nn.Module, str, Frozen], list[RemovableHandle]]
    linear: bool = False


def by_class(*names: str) -> Matches:
    """Modules whose class, or one of its bases, has one of these names."""
    return lambda module, _path: any(base.__name__ in names for base in type(module).__mro__)


def form_rule(name: str, matches: Matches, form: Form) -> Rule:
    """A rule that gives a module's affine form, and refuses the module when the form has another value."""

    def install(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not mode.depends((*args, *kwargs.values())):
                return
            with mode.paused():
                linear = form(Call(module, args, kwargs, output, mode))
                check(output, linear, path)
                mode.attach(output, Live(linear))

        return [module.register_forward_hook(replace, with_kwargs=True)]

    return Rule(name, matches, install)


def check(output: Tensor, linear: Tensor, path: str, dtype: torch.dtype | None = None) -> None:
    """Refuse a form whose value is not the module's, up to the rounding of `dtype`: by default the output's own.

    Raises
    ------
    NotExactError
        Naming the module.
    """
    error = (linear.detach().to(output.dtype) - output).norm() / output.norm().clamp_min(torch.finfo(output.dtype).tiny)
    if not error <= TOLERANCE[dtype or output.dtype]:
        raise NotExactError(
            f"{path}: its frozen linear form differs from its real output by {error:.1e}; "
            "the rule for it does not describe this module",
            path,
        )


_MORE_ACTIVATIONS = ("LeakyReLU", "PReLU", "RReLU", "Hardswish")


def _activation(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
    """A module that is one function of each element: its ratio is held, whatever is inside."""

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        status = mode.status(args[0])
        if not isinstance(status, Live) or getattr(
            module, "inplace", False
        ):  # its input is gone; its operation is known
            return
        with mode.paused():
            form = secant(lambda z: type(module).forward(module, z), args[0], output, mode.dtype)
            if form is None:
                return
            linear = status.linear * form.ratio
            if form.at_zero is not None:
                linear = linear + mode.constant(form.at_zero, None, "at_zero")
            mode.attach(output, status.then(linear, status.root, active=True))

    return [module.register_forward_hook(replace)]


def _is_activation(module: nn.Module, path: str) -> bool:
    """An MLP's activation. A tanh is one only where it has an activation's name: elsewhere it may be anything."""
    home, name = type(module).__module__, type(module).__name__
    if isinstance(module, nn.Tanh):
        return path.rpartition(".")[2].startswith(("act", "activation", "intermediate_act"))
    if home == "torch.nn.modules.activation":
        return name.lower() in ACTIVATIONS or name in _MORE_ACTIVATIONS
    return home == "transformers.activations" or name == "BloomGelu"


def held_submodule(*paths: str) -> Callable[[nn.Module, str, Frozen], list[RemovableHandle]]:
    """What these submodules give is a coefficient."""

    def install(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
        def hold(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            if mode.status(output) is not None:
                mode.attach(output, Held(mode.origin("held by rule")))

        return [module.get_submodule(sub).register_forward_hook(hold) for sub in paths if hasattr(module, sub)]

    return install


def held_parts(which: HeldParts) -> Callable[[nn.Module, str, Frozen], list[RemovableHandle]]:
    """Where a module's own code splits a tensor, some of the parts are coefficients."""

    def install(module: nn.Module, _path: str, mode: Frozen) -> list[RemovableHandle]:
        mode.hold_parts(module, which)
        return []

    return install


def _quantised(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
    """A quantised linear layer: its kernel is run unseen, and its weight, dequantised once a call, beside it.

    Its bias is collected where constants are. That its kernel rounds in another dtype than the model is refused.
    """
    entered: list[bool] = []

    def enter(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        entered.append(mode.unseen)
        mode.unseen = True

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mode.unseen = entered.pop()
        if mode.unseen or not mode.depends(args):
            return
        status = mode.status(args[0])
        if not isinstance(status, Live):
            mode.attach(output, Held(mode.origin("linear")))
            return
        with mode.paused():
            weight, bias = quantised.dense_weight(module), module._parameters.get("bias")
            if weight is None:
                raise NotExactError(
                    f"{path}: its quantised weight is not at hand when the layer has run; do not offload it",
                    path,
                )
            added = None if bias is None else mode.constant(bias.detach().to(mode.dtype), bias, "bias")
            linear = nn.functional.linear(status.linear, weight.to(mode.dtype), added)
            with torch.no_grad():
                again = nn.functional.linear(args[0].to(mode.dtype), weight.to(mode.dtype), added)
            rounds = quantised.compute_dtype(module, output.dtype)
            if torch.finfo(output.dtype).eps < _SINGLE <= torch.finfo(rounds).eps:
                mend = f"load it with bnb_4bit_compute_dtype={output.dtype}"
                if quantised.packs(module):
                    mend = f"load it with loclin.load, or set {PACKING} = False on its layers before they run"
                raise NotExactError(
                    f"{path} computes in {str(rounds)[6:]}, but the model is in {str(output.dtype)[6:]}: {mend}, or "
                    f"load it with dtype={rounds}",
                    path,
                )
            check(output, again, path, rounds)
            mode.attach(output, status.then(linear))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _refused(module: nn.Module, path: str, mode: Frozen) -> list[RemovableHandle]:
    """A module whose quantised weights cannot be read."""
    kind = f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if mode.depends((*args, *kwargs.values())):
            raise NotExactError(
                f"{path} ({kind}) has quantised weights, and {quantised.why_unknown(module)}: load the model without "
                f'quantisation, or say what it is with loclin.freeze.register("{type(module).__name__}", form)',
                path,
            )

    return [module.register_forward_pre_hook(refuse, with_kwargs=True, prepend=True)]


def _is_delta_net(module: nn.Module, _path: str) -> bool:
    return type(module).__name__.endswith("GatedDeltaNet")


def _is_mamba2(module: nn.Module, _path: str) -> bool:
    name = type(module).__name__
    return "Mamba2" in name or name in ("BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Zamba2MambaMixer")


RULES: tuple[Rule, ...] = (
    Rule("quantised linear layer", quantised.is_quantised, _quantised, linear=True),
    Rule("quantised in an unknown way", quantised.is_unknown, _refused, linear=True),
    Rule("activation", _is_activation, _activation),
    # of x, B and C, which a state space multiplies with one another, x is live
    Rule(
        "selective state space",
        by_class("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"),
        held_submodule("x_proj"),
    ),
    Rule(
        "state space duality",
        _is_mamba2,
        held_parts(lambda widths: (1, 2) if len(widths) == 3 and widths[1] == widths[2] else ()),
    ),
    # of q, k and v, v is live, as in attention
    Rule(
        "gated delta rule",
        _is_delta_net,
        held_parts(lambda widths: (0, 1) if len(widths) == 3 and widths[0] == widths[1] else ()),
    ),
)
"""The rules that come with loclin."""

_registered: list[Rule] = []


def rule_for(module: nn.Module, path: str) -> Rule | None:
    """The first rule that matches a module; a registered one comes before loclin's own."""
    return next((rule for rule in (*_registered, *RULES) if rule.matches(module, path)), None)


@contextmanager
def rules_installed(paths: dict[nn.Module, str], mode: Frozen) -> Iterator[None]:
    """Put the rules' hooks on the modules, and take them off again."""
    handles: list[RemovableHandle] = []
    try:
        for module, path in paths.items():
            rule = rule_for(module, path)
            if rule is not None and (rule.linear or not mode.hold.ordinary):
                handles += rule.install(module, path, mode)
        yield
    finally:
        for handle in handles:
            handle.remove()


class Registration:
    """A rule of the user's own; `remove()`, or the end of a `with` block, takes it back."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        _registered.insert(0, rule)

    def remove(self) -> None:
        """Take the rule back."""
        if self.rule in _registered:
            _registered.remove(self.rule)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.remove()


def register(modules: type[nn.Module] | str | Callable[[nn.Module], bool], form: Form) -> Registration:
    """Say how modules of your own architecture become linear.

    Parameters
    ----------
    modules
        A class, a class's name, or a function that tells whether a module is meant.
    form
        The module's output as an affine function of its inputs: given the call (see `Call`), build it from
        `call.live(x)` (affine in the network's input) and from coefficients made of `call.args`, `call.output` and
        the module's weights. Its value is compared with the module's own output at each call.

    Returns
    -------
    Registration
        The rule in force, until its `remove()` or the end of its `with` block.

    Raises
    ------
    OptionError
        For anything else.
    """
    if not (isinstance(modules, str) or callable(modules)) or not callable(form):
        raise OptionError("register takes a class, a class's name or a function, and a function that gives the form")
    if isinstance(modules, str):
        return Registration(form_rule(modules, by_class(modules), form))
    if isinstance(modules, type):
        kind = modules
        return Registration(form_rule(kind.__name__, lambda module, _path: isinstance(module, kind), form))
    is_meant = modules
    return Registration(form_rule("registered", lambda module, _path: is_meant(module), form))
