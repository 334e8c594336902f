"""Ways to say how much each token gives to a prediction: the frozen map's shares, and others to compare with.

Every method gives one number for each token `[T]`; a name is the method and its options, joined by slashes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.nearby import Nearby
from loclin.freeze import Gate, Hold
from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized
from loclin.network.chain import Chain
from loclin.network.points import Point

GATES: tuple[Gate, ...] = ("activation", "up", "half")
STEPS = 16
"""Points on the way of integrated gradients."""

Objective = Callable[[Tensor], Tensor]
"""From logits `[..., V]` to the number that is shared out."""


def objectives(logits: Float[Tensor, " V"]) -> dict[str, Objective]:
    """What can be shared out of a prediction: the likeliest token's logit, alone or against others.

    `logit` is the logit itself, `margin` its distance to the runner-up's, `centred` its distance to the mean over the
    vocabulary, `log-probability` its distance to the logarithm of the sum of exponentials, the softmax's.
    """
    first, second = logits.topk(2).indices.tolist()
    return {
        "logit": lambda z: z[..., first],
        "margin": lambda z: z[..., first] - z[..., second],
        "centred": lambda z: z[..., first] - z.mean(-1),
        "log-probability": lambda z: z[..., first] - z.logsumexp(-1),
    }


def cotangents(logits: Float[Tensor, " V"]) -> Float[Tensor, "n V"]:
    """The gradients of the objectives at the prompt's logits, in their order."""
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.stack([torch.autograd.grad(objective(leaf), leaf)[0] for objective in objectives(leaf).values()])


def frozen(lin: Linearized, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Shares of the frozen maps: J_i x_i, or J_i (x_i - mean embedding), through an objective's gradient.

    Named `frozen/GATE/OBJECTIVE/BASELINE`. Cost: one column for each objective and gate.
    """
    found = {}
    for gate in GATES:
        J = _map(lin, gate)
        pulled = J.rmatmat(cotangents(J.value))
        for name, cotangent in zip(objectives(J.value), pulled, strict=True):
            found[f"frozen/{gate}/{name}/zero"] = (cotangent * J.input).sum(-1)
            found[f"frozen/{gate}/{name}/mean"] = (cotangent * (J.input - mean)).sum(-1)
    return found


def _map(lin: Linearized, gate: Gate) -> LinearMap:
    """The map to the logits with any gate split, of the one trace that there is."""
    if gate == lin.gate:
        return lin.jacobian(target="logits")
    chain = Chain(lin.trace, Hold(gate, lin.precision), explicit=False)  # the trace's coefficients are of its own gate
    return LinearMap(chain, Point("embed"), Point("logits"), lin.trace.length - 1)


def gradient(lin: Linearized, nearby: Nearby, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Gradient times input, of the model as it is: `gradient/OBJECTIVE/BASELINE`.

    Cost: a forward and a backward pass for each objective.
    """
    x, shared = lin.embeddings, objectives(lin.trace.stock_logits)
    inputs = x.repeat(len(shared), 1, 1).requires_grad_()
    logits = nearby.embeddings(inputs).logits
    total = torch.stack([objective(row) for objective, row in zip(shared.values(), logits, strict=True)]).sum()
    (slopes,) = torch.autograd.grad(total, inputs)
    found = {}
    for name, slope in zip(shared, slopes, strict=True):
        found[f"gradient/{name}/zero"] = (slope * x).sum(-1)
        found[f"gradient/{name}/mean"] = (slope * (x - mean)).sum(-1)
    return found


def integrated_gradients(
    lin: Linearized, nearby: Nearby, mean: Float[Tensor, " d"], fixed: Sequence[int]
) -> dict[str, Tensor]:
    """Integrated gradients of the log-probability, by captum: `integrated/log-probability/mean`; none without it.

    The baseline is the mean embedding at every position but those that are `fixed`. Zero would not do: layers begin
    with a norm, so that along the way from zero almost nothing happens but at its very beginning.

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
    """What costs nothing: how late a token is, and how much attention later tokens give it (none to the last)."""
    return {"last first": torch.arange(len(lin.tokens)), "attention received": lin.trace.attention_received}
