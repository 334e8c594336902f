"""Torch's modes and switches: set to their defaults while loclin computes, and restored afterwards.

So a result has the same bits whatever surrounds the call: inference mode, autocast, no gradients, another default
device or dtype, or TF32.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from loclin.common.shared import SharedState
from loclin.errors import BudgetError, OptionError, first_line

F = TypeVar("F", bound=Callable[..., Any])

_backends: Any = torch.backends
_NEW = hasattr(_backends.cuda.matmul, "fp32_precision")
"""Whether torch has a switch for each operation. The older switches then raise if both kinds have been set."""
_ON_CUDA = (_backends.cuda.matmul, *(getattr(_backends.cudnn, name, None) for name in ("conv", "rnn")))
_ON_CPU = tuple(getattr(_backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn"))
_SWITCHES: tuple[tuple[Any, str, Any], ...] = (
    *((backend, "fp32_precision", "ieee") for backend in (*_ON_CUDA, *_ON_CPU) if hasattr(backend, "fp32_precision")),
    *(() if _NEW else ((_backends.cuda.matmul, "allow_tf32", False), (_backends.cudnn, "allow_tf32", False))),
    (_backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (_backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
)
"""(where, name, exact value)."""


def _compute_exactly(stack: ExitStack) -> None:
    if not _NEW:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
    for backend, name, exact in _SWITCHES:
        before = getattr(backend, name)
        if before != exact:
            stack.callback(setattr, backend, name, before)
            setattr(backend, name, exact)


def _be_plain(stack: ExitStack) -> None:
    if torch.get_default_dtype() != torch.float32:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)


def _run_eagerly(stack: ExitStack) -> None:
    if "torch._dynamo" in sys.modules:  # slow to import, and not needed unless something is compiled
        stack.enter_context(torch.compiler.set_stance("force_eager"))


exact_arithmetic = SharedState(_compute_exactly)
"""Switches TF32 and reduced-precision sums off, for the whole process; restored afterwards, also after an error."""
eager_code = SharedState(_run_eagerly)
"""Runs compiled code eagerly: a compiled graph hides its operations."""
_plain = SharedState(_be_plain)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Set torch to its defaults: gradients on, no inference mode, no autocast, exact arithmetic.

    Also the default device and dtype: the CPU and float32. The dtype and the switches of `exact_arithmetic` belong to
    the process, everything else to the thread.

    Raises OptionError inside a function that torch transforms or traces (`vmap`, `grad`, `jit.trace`, fake tensors),
    where tensors have no values. Where a device runs out of memory inside, BudgetError says what would fit.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or torch._C._is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        raise OptionError(
            "loclin was called inside a function that torch transforms or traces (vmap, grad, jit.trace, fake "
            "tensors); call it outside, on ordinary tensors"
        )
    with ExitStack() as stack:
        stack.enter_context(exact_arithmetic())
        stack.enter_context(_plain())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        accelerator = torch.accelerator.current_accelerator()
        for kind in {"cpu", "cuda" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            yield
        except torch.OutOfMemoryError as fault:
            fault.__traceback__ = None  # it holds all tensors of the call, for as long as the error is kept
            raise BudgetError(
                f"a device is full: {first_line(fault).partition(' Including')[0]} Free what else is there, or give a "
                "smaller memory= to linearize, fewer tokens, or dtype='bfloat16' to load; a model that does not fit a "
                "GPU fits device='cpu', with stream=True one layer at a time"
            ) from None


def in_plain_torch(function: F) -> F:
    """Run a function in `plain_torch`; a generator only while it computes its next value."""
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with plain_torch():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Iterator[Any]:
        values, done = function(*args, **kwargs), object()
        while True:
            with plain_torch():
                value = next(values, done)
            if value is done:
                return
            yield value

    return step  # type: ignore[return-value]


def usable(tensor: Tensor) -> Tensor:
    """A caller's tensor, detached; copied if it was made in inference mode, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
