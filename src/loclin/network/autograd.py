"""Products of blocks of vectors with the Jacobian of an autograd graph.

For a graph y = A x + b, with held coefficients detached: vjp u -> A^T u by one backward pass, and jvp v -> A v as the
derivative of the vjp in its cotangent, since A^T u is linear in u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loclin.errors import ModelError

Constants = list[tuple[str, Tensor]]
"""(name, leaf) of each constant that is added to a live tensor."""


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[Any, ...]:
    """`torch.autograd.grad`, which says so where a graph is refused because a weight in it has changed.

    Raises
    ------
        ModelError: the model's weights changed since the graph was built.
    """
    try:
        return torch.autograd.grad(outputs, inputs, grad_outputs, **options)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ModelError(
            "the model's weights changed while a map was computed: stop training it meanwhile, and linearize it again"
        ) from error


def batched_vjp(output: Tensor, source: Tensor, cotangents: Tensor) -> Tensor:
    """Pull a block of cotangents `[n, *output.shape]` back from `output` to `source`: `[n, *source.shape]`."""
    pulled = None
    if output.requires_grad:
        (pulled,) = grad(output, source, cotangents, is_grads_batched=True, allow_unused=True, retain_graph=True)
    return source.new_zeros((len(cotangents), *source.shape)) if pulled is None else pulled


def batched_jvp(output: Tensor, source: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that pushes a block of tangents `[n, *source.shape]` from `source` to `output`: `[n, *output.shape]`.

    Unlike forward-mode AD, the derivative of a vjp respects `detach`, and so holds every frozen coefficient.
    """
    cotangent, pulled = torch.zeros_like(output, requires_grad=True), None
    if output.requires_grad:
        (pulled,) = grad(output, source, cotangent, create_graph=True, allow_unused=True)

    def push(tangents: Tensor) -> Tensor:
        if pulled is None or not pulled.requires_grad or not len(tangents):
            return output.new_zeros((len(tangents), *output.shape))
        (pushed,) = grad(pulled, cotangent, tangents, is_grads_batched=True, retain_graph=True)
        return pushed

    return push


def push_constants(
    constants: Constants, output: Tensor, then: Callable[[Tensor], Tensor] = lambda pushed: pushed
) -> dict[str, Tensor]:
    """What each constant that reaches `output` adds there, or behind `then` (of `[1, *output.shape]`), by name."""
    found: dict[str, Tensor] = {}
    for name, leaf in constants:
        added = then(batched_jvp(output, leaf)(leaf.detach().unsqueeze(0)))[0]
        if added.any():
            found[name] = found[name] + added if name in found else added
    return found


def depends_on(output: Tensor, leaf: Tensor) -> bool:
    """Whether `output`'s graph leads back to a leaf."""
    if not output.requires_grad:
        return False
    (moved,) = grad(output.sum(), leaf, retain_graph=True, allow_unused=True)
    return moved is not None
