"""Ways to say how much each token gives to a prediction: the frozen map's shares, and others to compare with.

Every method gives one number for each token `[T]`; a name is the method and its options, joined by slashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.nearby import Nearby
from loclin.freeze import Gate
from loclin.linearization import Linearization

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


def frozen(lins: Mapping[Gate, Linearization], mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Shares of the frozen maps: J_i x_i, or J_i (x_i - mean embedding), through an objective's gradient.

    Named `frozen/GATE/OBJECTIVE/BASELINE`. Cost: one column for each objective and gate.
    """
    found = {}
    for gate, lin in lins.items():
        J = lin.jacobian(target="logits")
        pulled = J.rmatmat(cotangents(J.value))
        for name, cotangent in zip(objectives(J.value), pulled, strict=True):
            found[f"frozen/{gate}/{name}/zero"] = (cotangent * J.input).sum(-1)
            found[f"frozen/{gate}/{name}/mean"] = (cotangent * (J.input - mean)).sum(-1)
    return found


def gradient(lin: Linearization, nearby: Nearby, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Gradient times input, of the model as it is: `gradient/OBJECTIVE/BASELINE`. Cost: a forward, four backwards."""
    x = lin.embeddings.detach().clone().requires_grad_()
    logits = nearby.embeddings(x[None]).logits[0]
    found = {}
    for name, objective in objectives(logits.detach()).items():
        (slope,) = torch.autograd.grad(objective(logits), x, retain_graph=True)
        found[f"gradient/{name}/zero"] = (slope * x.detach()).sum(-1)
        found[f"gradient/{name}/mean"] = (slope * (x.detach() - mean)).sum(-1)
    return found


def integrated_gradients(lin: Linearization, nearby: Nearby, mean: Float[Tensor, " d"]) -> dict[str, Tensor]:
    """Integrated gradients of the log-probability, by captum: `integrated/log-probability/BASELINE`; none without it.

    Cost: `STEPS` forward and backward passes for each baseline.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        return {}
    objective = objectives(nearby.embeddings(lin.embeddings[None]).logits[0])["log-probability"]
    method = IntegratedGradients(lambda X: objective(nearby.embeddings(X).logits))
    x = lin.embeddings.detach()[None]
    found = {}
    for name, baseline in (("zero", torch.zeros_like(x)), ("mean", mean.expand_as(x))):
        found[f"integrated/log-probability/{name}"] = method.attribute(x, baseline, n_steps=STEPS)[0].sum(-1)
    return found


def simple(lin: Linearization) -> dict[str, Tensor]:
    """What costs nothing: how late a token is, and how much attention later tokens give it (none to the last)."""
    return {"last first": torch.arange(len(lin.tokens)), "attention received": lin.trace.attention_received}
