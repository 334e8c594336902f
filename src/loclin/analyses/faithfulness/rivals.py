"""Published attribution methods by token, in a few lines each on the same traced prompt: one score a token `[T]`.

Those that are a gradient times the input are in `scores`, with the frozen map's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.analyses.nearby import Nearby
from loclin.errors import LoclinError
from loclin.freeze.pattern import Pattern
from loclin.maps.linearized import Linearized
from loclin.models.forward import hidden_output, hooked
from loclin.network.autograd import batched_jvp
from loclin.network.link import LayerLink

STEPS = 20
"""Points on the path of integrated gradients."""


def attention(lin: Linearized) -> dict[str, Tensor]:
    """What the last token attends to, in the last layer, in the mean of all, and by rollout (2005.00928).

    Rollout multiplies (P + 1) / 2 of all layers, each the mean of its heads. Empty where a layer has no attention.
    """
    means = [_mean_pattern(lin, link) for link in lin.chain.layers]
    if any(mean is None for mean in means):
        return {}
    found = [mean for mean in means if mean is not None]
    rolled = torch.eye(lin.trace.length, dtype=torch.float64)
    for mean in found:
        rolled = 0.5 * (mean + torch.eye(len(mean), dtype=torch.float64)) @ rolled
    at = lin.trace.target_position(-1)
    every = torch.stack(found).mean(0)
    return {"attention, last layer": found[-1][at], "attention, mean": every[at], "attention rollout": rolled[at]}


def _mean_pattern(lin: Linearized, link: LayerLink) -> Float[Tensor, "T T"] | None:
    """The mean of a layer's heads' attention patterns. Cost: a forward pass of the layer."""
    seen: list[Pattern] = []
    freeze = lin.trace.freeze(link.module, link.options, name=link.name, keep=seen.append)
    with freeze as mode, torch.no_grad():
        mode.graph = False
        hidden = link.call.hidden.clone()
        mode.enter(hidden, link.call.value)
        link.call(hidden)
    length, mean = lin.trace.length, torch.zeros(lin.trace.length, lin.trace.length, dtype=torch.float64)
    if not seen or seen[-1].shape[1:] != (length, length):
        return None
    for block in seen[-1].everything():
        mean[block.rows, block.keys] = block.probs.double().mean(0).to("cpu")
    return mean


def gradients(lin: Linearized, nearby: Nearby, target: int) -> dict[str, Tensor]:
    """Gradient of the logit: its sum and its norm, times the input, and integrated from zero (1703.01365).

    Cost: `STEPS` + 1 forward and backward passes of the model.
    """
    x = lin.embeddings

    def slopes(scales: list[float]) -> Tensor:
        inputs = torch.stack([scale * x for scale in scales]).requires_grad_()
        (found,) = torch.autograd.grad(nearby.embeddings(inputs).logits[:, target].sum(), inputs)
        return found.detach()

    plain = slopes([1.0])[0]
    path = slopes([(step + 0.5) / STEPS for step in range(STEPS)]).mean(0)
    return {
        "gradient": plain.sum(-1),
        "gradient norm": plain.norm(dim=-1),
        "gradient × input": (plain * x).sum(-1),
        "integrated gradients": (path * x).sum(-1),
    }


def information_flow(lin: Linearized) -> dict[str, Tensor]:
    """Information flow routes (2403.00824): how near each attention edge and the residual stream are to their sum.

    An edge's nearness is max(0, |y|_1 - |y - z|_1); those into a position are scaled to 1, and multiplied over layers.
    An MLP stays at its position. Empty where a layer's attention cannot be told apart. Cost: T columns of each layer.
    """
    length = lin.trace.length
    flow = torch.eye(length, dtype=torch.float64)
    for link in lin.chain.layers:
        edges = _edges(link)
        if edges is None:
            return {}
        x, parts = edges  # the residual stream [T, d], and what each source gives to each position [T, T, d]
        y = x + parts.sum(0)
        size = y.abs().sum(-1)

        def near(z: Tensor, y: Tensor = y, size: Tensor = size) -> Tensor:
            return (size - (y - z).abs().sum(-1)).clamp_min(0)

        weights = torch.stack([near(part) for part in parts], dim=1)
        weights += torch.diag(near(x))
        flow = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) @ flow
    return {"information flow": flow[lin.trace.target_position(-1)]}


def _edges(link: LayerLink) -> tuple[Tensor, Tensor] | None:
    """A layer's input, and what its attention writes at each position from each source alone; None without either."""
    x = link.call.value[0].detach()
    alone = _one_by_one(x)
    try:
        pushed = link.pusher("resid_pre", "resid_mid")(alone)
    except LoclinError:
        return None
    return x.double().cpu(), (pushed - alone).double().cpu()


def _one_by_one(x: Float[Tensor, "T d"]) -> Float[Tensor, "T T d"]:
    """Each position's vector alone, with zeros at all others: one `[T, d]` for each."""
    return torch.eye(len(x), device=x.device, dtype=x.dtype)[..., None] * x


def decomposed_pass(lin: Linearized, target: int) -> dict[str, Tensor]:
    """DePass (2510.18462): one stream for each token, through frozen norms and attention; they sum to the model's.

    A neuron's activation is dealt out by a softmax over the streams of what each gives to its gate. Empty for models
    without `gate_proj` and `down_proj`. Cost: 3 T columns of each layer.
    """
    x = lin.embeddings.detach()
    streams = _one_by_one(x)
    for link in lin.chain.layers:
        found = {
            name: next((m for path, m in link.module.named_modules() if path.endswith(name)), None)
            for name in ("gate_proj", "down_proj")
        }
        gate, down = found["gate_proj"], found["down_proj"]
        if gate is None or down is None or link.parallel:
            return {}
        streams = link.pusher("resid_pre", "resid_mid")(streams)
        streams = streams + _dealt(link, gate, down, streams)
    at = lin.trace.target_position(-1)
    readout = torch.zeros(1, lin.trace.logits(at).shape[-1], dtype=x.dtype, device=x.device)
    readout[0, target] = 1
    J = lin.jacobian(f"resid_post.{lin.trace.n_layers - 1}", "logits")
    slope = J.rmatmat(readout)[0, at]
    return {"DePass": streams[:, at] @ slope}


def _dealt(link: LayerLink, gate: nn.Module, down: nn.Module, streams: Tensor) -> Tensor:
    """What a layer's MLP writes, dealt out to streams at `resid_mid` `[n, T, d]`."""
    seen: dict[str, Tensor] = {}
    trace = link.trace
    freeze = trace.freeze(link.module, link.options, name=link.name)
    with freeze as mode, torch.no_grad():
        hidden = link.call.hidden.clone()
        x = mode.enter(hidden, link.call.value.clone().requires_grad_())
        sublayers = link.call.block.sublayers
        assert sublayers.attn is not None
        assert sublayers.mlp is not None

        def leave_attention(_module: nn.Module, _args: object, output: Any) -> None:
            written = hidden_output(output)
            with mode.paused():
                seen["mid"] = (mode.live(written) + x).detach().requires_grad_()
                mode.enter(written, seen["mid"] - x.detach())

        def leave_gate(_module: nn.Module, _args: object, output: Tensor) -> None:
            with mode.paused():
                seen["gate"] = mode.live(output)

        def enter_down(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with mode.paused():
                seen["inner"] = mode.live(args[0]).detach().clone().requires_grad_()
                mode.enter(args[0], seen["inner"])

        def leave_mlp(_module: nn.Module, _args: object, output: Any) -> None:
            with mode.paused():
                seen["out"] = mode.live(hidden_output(output)).clone()

        with hooked(
            [
                link.module.get_submodule(sublayers.attn).register_forward_hook(leave_attention),
                link.module.get_submodule(sublayers.mlp).register_forward_hook(leave_mlp),
                gate.register_forward_hook(leave_gate),
                down.register_forward_pre_hook(enter_down),
            ]
        ):
            link.call(hidden)
    given = batched_jvp(seen["gate"], seen["mid"])(streams.unsqueeze(1))  # [n, 1, T, f]
    inner = given.softmax(0) * seen["inner"].detach()
    return batched_jvp(seen["out"], seen["inner"])(inner).squeeze(1)


def every_rival(lin: Linearized, nearby: Nearby, target: int) -> Iterator[tuple[str, Tensor]]:
    """Every method that this prompt's model has, by name."""
    for found in (
        attention(lin),
        gradients(lin, nearby, target),
        information_flow(lin),
        decomposed_pass(lin, target),
    ):
        yield from found.items()
