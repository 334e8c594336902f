"""Attribution methods by token: the shares of the frozen map, and other methods to compare with.

Every method gives one number for each token `[T]`. A name is the method and its options, joined by slashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.nearby import Nearby
from loclin.freeze import FreezeOptions, Gate, SharedAttention
from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized
from loclin.network.chain import Chain
from loclin.network.points import Point

GATES: tuple[Gate, ...] = get_args(Gate)
STEPS = 16
"""Points on the path of integrated gradients."""

Objective = Callable[[Tensor], Tensor]
"""A function from logits `[..., V]` to the attribution target."""


def objectives(logits: Float[Tensor, " V"]) -> dict[str, Objective]:
    """Return attribution targets of a prediction: the most probable token's logit, alone or minus something.

    `logit` is the logit itself, `margin` the logit minus the second largest, `centred` the logit minus the mean over
    the vocabulary, and `log-probability` the logit minus logsumexp.
    """
    first, second = logits.topk(2).indices.tolist()
    return {
        "logit": lambda z: z[..., first],
        "margin": lambda z: z[..., first] - z[..., second],
        "centred": lambda z: z[..., first] - z.mean(-1),
        "log-probability": lambda z: z[..., first] - z.logsumexp(-1),
    }


def cotangents(logits: Float[Tensor, " V"]) -> Float[Tensor, "n V"]:
    """Compute the gradients of the objectives at the prompt's logits, in their order."""
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.stack([torch.autograd.grad(objective(leaf), leaf)[0] for objective in objectives(leaf).values()])


def frozen(lin: Linearized, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Compute the shares of the frozen maps: J_i x_i, or J_i (x_i - mean embedding), through an objective's gradient.

    Names are `frozen/GATE/OBJECTIVE/BASELINE`. Cost: one column for each objective and gate.
    """
    found: dict[str, Tensor] = {}
    for gate in GATES:
        J = linear_map(lin, gate)
        pulled = zip(objectives(J.value), J.rmatmat(cotangents(J.value)), strict=True)
        found |= _times_input(f"frozen/{gate}", pulled, J.input, mean)
    return found


def _times_input(method: str, slopes: Iterable[tuple[str, Tensor]], x: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Multiply gradients with the input, counted from zero and from the mean embedding."""
    moves = {"zero": x, "mean": x - mean}
    return {f"{method}/{name}/{base}": (slope * move).sum(-1) for name, slope in slopes for base, move in moves.items()}


def linear_map(lin: Linearized, gate: Gate, shared: SharedAttention | None = None) -> LinearMap:
    """Return the map to the logits with any gate split, and attention frozen or shared, from the same trace."""
    if gate == lin.gate and shared is None:
        return lin.jacobian(target="logits")
    # the coefficients of the trace are of its own gate
    chain = Chain(lin.trace, FreezeOptions(gate, lin.precision, shared=shared), explicit=False)
    return LinearMap(chain, Point("embed"), Point("logits"), lin.trace.length - 1)


def gradient(lin: Linearized, nearby: Nearby, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Compute gradient times input: `gradient/OBJECTIVE/BASELINE`. Cost: a forward and a backward pass for each."""
    x, shared = lin.embeddings, objectives(lin.trace.stock_logits)
    inputs = x.repeat(len(shared), 1, 1).requires_grad_()
    logits = nearby.embeddings(inputs).logits
    total = torch.stack([objective(row) for objective, row in zip(shared.values(), logits, strict=True)]).sum()
    (slopes,) = torch.autograd.grad(total, inputs)
    return _times_input("gradient", zip(shared, slopes, strict=True), x, mean)


def integrated_gradients(
    lin: Linearized, nearby: Nearby, mean: Float[Tensor, " d"], fixed: Sequence[int]
) -> dict[str, Tensor]:
    """Compute integrated gradients of the log-probability with captum: `integrated/log-probability/mean`.

    The result is empty without captum. The baseline is the mean embedding, except at the `fixed` positions. Zero is a
    bad baseline: layers begin with a norm, so that on the path from zero nearly all change is at its very beginning.
    Cost: `STEPS` forward and backward passes.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        return {}
    objective = objectives(lin.trace.stock_logits)["log-probability"]
    method = IntegratedGradients(lambda X: objective(nearby.embeddings(X).logits))
    x = lin.embeddings[None]
    baseline = mean.expand_as(x).clone()
    baseline[:, fixed] = x[:, fixed]
    return {"integrated/log-probability/mean": method.attribute(x, baseline, n_steps=STEPS)[0].sum(-1)}


def simple(lin: Linearized) -> dict[str, Tensor]:
    """Compute two free scores: a token's position, and the attention that it receives from later tokens."""
    return {"last first": torch.arange(len(lin.tokens)), "attention received": lin.trace.attention_received}
